"""A ClientApp for worker processes of the tests: adds the node's number to what it was sent."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from conclave.protocol.codec import array_of as tensor_array
from conclave.protocol.codec import encode
from conclave.protocol.messages import TrainReply
from conclave.protocol.tensor_array import pack
from conclave.server.replies.receipts import EMPTY_RECEIPT

app = ClientApp()


@app.train()
def add(message: Message, context: Context) -> Message:
    number = int(context.node_config["partition-id"])
    tensors = {name: tensor + number for name, tensor in tensor_array(message.content).tensors.items()}
    # Some nodes answer with packed tensors, as a ledger stores them.
    reply = TrainReply(charge_id=f"{number:064x}", receipt=EMPTY_RECEIPT)
    return Message(encode(reply, pack(tensors) if number % 7 == 3 else tensors), reply_to=message)


@app.query("other")
def other_records(message: Message, context: Context) -> Message:
    return Message(RecordDict({"other": ConfigRecord({"x": 1})}), reply_to=message)


@app.query("error")
def error(message: Message, context: Context) -> Message:
    return Message(Error(1, "went wrong"), reply_to=message)
