"""The functions of Python that train, and what the commands ``run`` and ``resume`` share."""
