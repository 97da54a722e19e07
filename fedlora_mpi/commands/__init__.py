"""The commands, one file each, in the order in which ``--help`` lists them."""

from . import (
    check,
    config,
    digest,
    doctor,
    export,
    partition,
    plan,
    pretrain,
    report,
    reproduce,
    resume,
    run,
    status,
    submit,
    sweep,
    watch,
)
from .command import Command

COMMANDS: dict[str, Command] = {
    "run": run.COMMAND,
    "resume": resume.COMMAND,
    "sweep": sweep.COMMAND,
    "config": config.COMMAND,
    "plan": plan.COMMAND,
    "partition": partition.COMMAND,
    "report": report.COMMAND,
    "watch": watch.COMMAND,
    "status": status.COMMAND,
    "digest": digest.COMMAND,
    "export": export.COMMAND,
    "doctor": doctor.COMMAND,
    "check": check.COMMAND,
    "pretrain": pretrain.COMMAND,
    "submit": submit.COMMAND,
    "reproduce": reproduce.COMMAND,
}
