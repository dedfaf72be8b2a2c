"""Exception groups: the exceptions in them, however nested."""


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, in order; an exception alone is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]


def first_leaf(error: BaseException) -> BaseException:
    """The first exception in a group, or the exception itself if it is not a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
