"""Flushing: who reads receipts in Redis asks all processes first to write theirs."""

from ..broker.commands import Unavailable
from ..broker.receipt_store import ReceiptStore
from ..core.control_messages import FlushReceipts
from ..runtime.receipt_writing import ReceiptWriting
from .control import Control


def answer_flushes(control: Control, writing: ReceiptWriting, store: ReceiptStore) -> None:
    """Answer when the receipts of this process are in Redis."""

    async def flush(_request: FlushReceipts) -> None:
        if not await writing.flush(store.write):
            raise Unavailable("receipts not written")

    control.handle("flush_receipts", FlushReceipts, flush)
