"""What a frontend that stops waits for."""

import asyncio
import socket
import threading
from pathlib import Path

import grpc
from google.protobuf.message_factory import GetMessageClass
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from baton.frontend.api.prompts import Prompts
from baton.frontend.engine_client import EngineClient
from baton.frontend.in_flight import InFlight
from baton.frontend.main import _drain
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.rpc_server import Inference
from baton.frontend.tokenizer import Tokenizer
from baton.proto.config import FrontendConfig, ModelConfig, RpcConfig
from baton.proto.rpc.schema import schema
from baton.proto.rpc.server import RpcServer

INFO = ModelInfo(("m",), 100, 300, (256,), SamplingDefaults())
THREADS = 4
"""At most, of those that tokenise."""


def one_token_per_byte() -> Tokenizer:
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rpc(channel: grpc.aio.Channel, name: str) -> grpc.aio.UnaryUnaryMultiCallable:
    service = schema().service("Inference")
    answer = GetMessageClass(service.methods_by_name[name].output_type)
    return channel.unary_unary(f"/{service.full_name}/{name}", lambda m: m.SerializeToString(), answer.FromString)


def test_a_grpc_call_that_waits_to_be_tokenised_is_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        frontend = FrontendConfig("f", ModelConfig("", ("m",)), f"ipc://{tmp_path}/scheduler", str(tmp_path))
        client, prompts, requests = EngineClient(frontend), Prompts(one_token_per_byte(), None, INFO), InFlight()
        inference = Inference(prompts, INFO, None, None, 60.0)  # type: ignore[arg-type]  # they are not called
        config, tokenisers_free = RpcConfig(port=free_port()), threading.Event()
        server = RpcServer(config, {"Inference": inference}, requests.one)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{config.port}") as channel, asyncio.timeout(60):
            busy = [asyncio.ensure_future(prompts.in_thread(tokenisers_free.wait)) for _ in range(THREADS)]
            try:
                call = rpc(channel, "Tokenize")(schema().message("TokenizeRequest")(text="abc"))
                while not len(requests):
                    await rpc(channel, "ListModels")(schema().message("ListModelsRequest")())
                drained = asyncio.create_task(_drain(client, requests, 60.0))
                await rpc(channel, "ListModels")(schema().message("ListModelsRequest")())
                assert not drained.done()
            finally:
                tokenisers_free.set()
            assert len((await call).token_ids) == 3
            await asyncio.gather(drained, *busy)
        await server.stop(0)
        prompts.close()
        client.close()

    asyncio.run(run())
