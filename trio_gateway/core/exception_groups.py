"""Exception groups: the exceptions in them, however nested."""


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, in order; an exception that is no group is its own only leaf."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]


def first_leaf(error: BaseException) -> BaseException:
    """The first exception in a group, or the exception itself if it is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
