"""The error that the command line prints in one line, without a traceback."""


class SdpoError(ValueError):
    """Something that the user can mend: the message says what is wrong and what to do.

    The base of every error that ``sdpo`` and ``sdpo_parallel`` raise on purpose. ``sdpo_kernels``
    stands alone and raises plain ``ValueError`` for bad arguments.
    """
