"""What has to happen before any test module is imported."""

import far  # noqa: F401  registers its device: autograd counts devices once, in the first backward pass of a process
