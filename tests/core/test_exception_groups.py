from trio_gateway.core.exception_groups import first_leaf, leaves

ONE, TWO, THREE = ValueError("one"), OSError("two"), KeyboardInterrupt()
NESTED = BaseExceptionGroup("", [ExceptionGroup("", [ExceptionGroup("", [ONE]), TWO]), THREE])


def test_leaves_are_in_order_however_nested() -> None:
    assert leaves(NESTED) == [ONE, TWO, THREE]
    assert first_leaf(NESTED) is ONE


def test_an_exception_is_its_own_leaf() -> None:
    assert leaves(TWO) == [TWO]
    assert first_leaf(TWO) is TWO
