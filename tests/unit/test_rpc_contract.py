"""The .proto files: every word of them is commented, and nothing that was published changes."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from baton.frontend.api.errors import ApiError
from baton.frontend.api.requests import CompletionRequest, read
from baton.frontend.bodies import MAX_VALUES
from baton.frontend.rpc_server import check_values, completion_fields
from baton.proto.lifecycle import Duty, FinishReason, Role
from baton.proto.rpc.schema import descriptor_set, schema
from baton.scheduler_proc.instructions import EventKind

CONTRACT = Path(__file__).with_name("rpc_contract.txt")
FILES = descriptor_set().file


def test_what_was_published_is_as_it_was() -> None:
    """Lines are only added: numbers, names, types and labels of fields are on the wire of clients built earlier."""
    present = [line for file in FILES for line in contract(file)]
    published = CONTRACT.read_text().splitlines()
    broken = [line for line in published if line not in present]
    assert broken == [], "clients that exist would break; append new fields and leave these as they are"
    added = [line for line in present if line not in published]
    assert added == [], f"compatible, and to be published: add these lines to {CONTRACT.name}"


def contract(file: FileDescriptorProto) -> Iterator[str]:
    for service in file.service:
        for method in service.method:
            stream = "stream " if method.server_streaming else ""
            yield f"rpc {file.package}.{service.name}.{method.name}({method.input_type}) {stream}{method.output_type}"
    for enum in file.enum_type:
        yield from (f"enum {file.package}.{enum.name}.{value.name} = {value.number}" for value in enum.value)
    for message in file.message_type:
        yield from fields(f"{file.package}.{message.name}", message)


def fields(name: str, message: DescriptorProto) -> Iterator[str]:
    yield f"message {name}"
    for field in message.field:
        label = FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
        presence = "explicit" if field.proto3_optional else "implicit"
        if field.HasField("oneof_index") and not field.proto3_optional:
            presence = f"oneof {message.oneof_decl[field.oneof_index].name}"
        kind = field.type_name or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        yield f"field {name}.{field.name} = {field.number}: {label} {presence} {kind}"
    for nested in message.nested_type:
        yield from fields(f"{name}.{nested.name}", nested)


@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file.name).name)
def test_every_service_method_message_field_and_value_is_commented(file: FileDescriptorProto) -> None:
    commented = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments.strip()}
    assert [where for where, path in declared(file) if path not in commented] == []


def declared(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names with their places, by the field numbers of descriptor.proto."""
    for i, message in enumerate(file.message_type):
        yield message.name, (4, i)
        yield from ((f"{message.name}.{field.name}", (4, i, 2, k)) for k, field in enumerate(message.field))
    for i, enum in enumerate(file.enum_type):
        yield enum.name, (5, i)
        yield from ((value.name, (5, i, 2, k)) for k, value in enumerate(enum.value))
    for i, service in enumerate(file.service):
        yield service.name, (6, i)
        yield from ((f"{service.name}.{method.name}", (6, i, 2, k)) for k, method in enumerate(service.method))


IN_THE_REQUEST = {"model", "prompt", "priority", "add_special_tokens"}
HTTP_ALONE = {
    *("stream", "stream_options", "user", "response_format", "echo", "return_tokens_as_token_ids", "best_of"),
    "request_id",
}
"""How an answer is written down, and older ways to say structured_outputs, as are all that begin with guided_."""


def test_sampling_parameters_are_those_of_the_http_api() -> None:
    over_http = {field.name for field in msgspec.structs.fields(CompletionRequest)}
    over_grpc = {field.name for field in schema().message("SamplingParams").DESCRIPTOR.fields}
    missing = over_http - over_grpc - IN_THE_REQUEST - HTTP_ALONE
    assert {name for name in missing if not name.startswith("guided_")} == set()
    assert [name for name in over_grpc if read({"prompt": "p", name: None}, CompletionRequest)[1]] == []


def test_a_message_becomes_the_request_that_json_would() -> None:
    fields = {
        "text": "p",
        "sampling": {
            "temperature": 0.0,
            "seed": -(2**40),
            "stop": ["a", "b"],
            "stop_token_ids": [3],
            "logit_bias": {5: -1.0},
            "skip_special_tokens": False,
        },
        "add_special_tokens": False,
    }
    raw = completion_fields(schema().message("GenerateRequest")(**fields))
    assert raw == {
        "prompt": "p",
        "temperature": 0.0,
        "seed": -(2**40),
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "logit_bias": {"5": -1.0},
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }
    assert completion_fields(schema().message("GenerateRequest")()) == {"prompt": []}
    nested = schema().message("GenerateRequest")(sampling={"structured_outputs": {"json": "{}", "choice": ["x"]}})
    assert completion_fields(nested)["structured_outputs"] == {"json": "{}", "choice": ["x"]}


@pytest.mark.parametrize(
    ("enum", "ours"),
    [
        ("EventKind", [kind.value for kind in EventKind]),
        ("Role", [role.upper() for role in Role]),
        ("FinishReason", [FinishReason.STOP.upper(), FinishReason.LENGTH.upper()]),
        ("WorkerState", [*(duty.upper() for duty in Duty), "DRAINED"]),
    ],
)
def test_enums_have_the_values_of_ours(enum: str, ours: list[str]) -> None:
    assert {name for name in schema().enum(enum) if name != "UNSPECIFIED"} == set(ours)


def test_lists_are_bounded_wherever_they_are() -> None:
    ids = {"ids": [1] * (MAX_VALUES // 2)}
    embed = schema().message("EmbedRequest")
    check_values(embed(inputs=[{"token_ids": ids}, {"text": "word " * MAX_VALUES}]))
    generate = schema().message("GenerateRequest")
    sampling = {"allowed_token_ids": ids["ids"], "logit_bias": {1: 0.5}}
    for request in (embed(inputs=[{"token_ids": ids}] * 2), generate(token_ids=ids, sampling=sampling)):
        with pytest.raises(ApiError, match="values"):
            check_values(request)
