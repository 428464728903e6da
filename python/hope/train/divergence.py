"""What a run says that cannot go on."""


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message says where, and what is left."""
