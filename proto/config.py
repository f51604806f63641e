"""The configuration tree: built once by the command line, frozen, handed to each process as JSON.

A component takes the narrowest part that it reads. Names follow vLLM's where the meaning is the same.
"""

from typing import TypeVar

import msgspec

KV_TRANSFERS = {"cpu": ("shm", "tcp", "gloo"), "cuda": ("cuda_ipc", "tcp", "nccl", "gloo")}
"""The transports that a worker's device can use."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all configuration structs."""


class NetworkConfig(Config):
    """How a process is reached from other hosts."""

    host: str = ""
    """IP address of this host at which its sockets listen besides; empty: they are for this host alone."""
    key_file: str = ""
    """The cluster's key, which TCP connections need then; required beyond loopback."""


class ModelConfig(Config):
    """What is served."""

    path: str
    """Directory with config.json, safetensors and tokenizer files (GGUF files were converted into one before)."""
    served_names: tuple[str, ...]
    """Names clients may use; the first is the one in responses."""
    dtype: str = "auto"
    """Weights and activations: auto (the checkpoint's, float32 on CPU) | float32 | float16 | bfloat16."""
    batch_invariant: bool = False
    """On a GPU: logits have the same bits whatever else is in the steps, at some cost; on CPU they always have.
    kernels/cuda/invariant.py says what exactly is promised."""
    load_format: str = "auto"
    """auto | dummy (random weights, uniform in ±1e-3, from config.json alone)."""
    max_model_len: int = 0
    """Prompt plus output tokens; 0 is the model's own limit."""
    tokenizer: str = ""
    """Directory or tokenizer.json; empty: the model's."""
    chat_template: str = ""
    """File with a jinja2 template; empty: the tokenizer's."""
    seed: int = 0
    """Of dummy weights."""


class CacheConfig(Config):
    """A worker's KV pool."""

    block_size: int = 16
    """Tokens per block, a multiple of 16."""
    num_blocks: int = 0
    """Per worker; 0: from kv_cache_memory_bytes."""
    kv_cache_memory_bytes: int = 0
    """Per worker; 0: a share of the machine's free memory, or what gpu_memory_utilization leaves on a GPU."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, activations and KV pools of all workers on it may take together."""
    enable_prefix_caching: bool = True


class BatchConfig(Config):
    """A worker's iterations."""

    max_num_batched_tokens: int = 0
    """Token budget of a step; 0: 256 on CPU, 8192 on CUDA. It also bounds a prefill chunk."""
    max_num_seqs: int = 0
    """Streams running in one step at most; 0: 256 on CPU, 1024 on CUDA."""
    target_itl_ms: float | None = None
    """Time between two tokens that a step with prompts keeps while streams run, unless the queue of prompts is long; 0:
    no target; None: none on CPU, 15 on CUDA."""
    prompts_first: bool = False
    """Streams stay out of a step that prompts fill, instead of taking a token each in all of them: fewer, larger decode
    steps for the same work, but streams pause while prompts queue. For offline use, where nobody waits for a token."""
    depth: int = 0
    """Steps in flight; 0: 1 on CPU, 2 on CUDA."""


class LeaseConfig(Config):
    """Timing of the KV handoff."""

    unbound_s: float = 10.0
    """A READY lease that no holder has opened lives this long."""
    holder_s: float = 5.0
    """An opened lease lives this long after its holder's last Open."""
    renew_interval_s: float = 1.0
    """How often the holder sends Open again, and how often an unanswered Confirm is resent."""
    remember_s: float = 60.0
    """A consumed lease answers the same Confirm with Ok for this long; tombstones of cancelled streams live as long."""


class WorkerConfig(Config):
    """One worker process."""

    name: str
    role: str
    """prefill | decode | unified."""
    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    batch: BatchConfig = BatchConfig()
    lease: LeaseConfig = LeaseConfig()
    device: str = "cpu"
    """cpu | cuda."""
    gpu: int = 0
    """Index of the GPU among those that are visible."""
    kv_transfer: str = "auto"
    """How KV blocks come from other workers: auto (the best that a pair has, told in the log) | local (only within a
    keeper's pool, where they change owner) | cuda_ipc | nccl | gloo | shm | tcp."""
    attention_backend: str = "auto"
    """auto (what was measured to be fastest) | triton (our own kernels) | fa3 (the extra of that name; for prompts)."""
    threads: int = 0
    """Compute threads on CPU; 0: all cores that this process may use."""
    scheduler: str = ""
    """Address of the scheduler."""
    keeper: str = ""
    """ZeroMQ endpoint of the keeper whose memory this worker uses; empty: it has its own."""
    keeper_workers: int = 1
    """Workers that use it, this one included."""
    mps_dir: str = ""
    """Directory of the MPS daemon whose client it is; empty: processes take turns on the GPU."""
    mps_percentage: int = 100
    """Of the multiprocessors that it may use then."""
    run_dir: str = ""
    """0700 directory for this worker's sockets."""
    network: NetworkConfig = NetworkConfig()
    early_bind_tokens: int = 512
    """Prompts with at least this many tokens to compute are handed over chunk by chunk while they run."""
    log_interval_s: float = 10.0


class KeeperConfig(Config):
    """A keeper process: the memory of one device that several workers use."""

    name: str
    endpoint: str
    """ZeroMQ endpoint it binds."""
    parts: dict[str, float]
    """Worker -> its part of the KV blocks; they sum to 1."""
    device: str = "cpu"
    """cpu | cuda."""
    gpu: int = 0
    """Index of the GPU among those that are visible."""
    mps_dir: str = ""
    """Directory of the MPS daemon to run; empty: none."""


class RpcConfig(Config):
    """One gRPC server."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: the process serves no gRPC."""
    tls_cert: str = ""
    """PEM file with the certificate chain; empty: plaintext."""
    tls_key: str = ""
    """PEM file with its private key."""
    api_keys: tuple[str, ...] = ()
    """Bearer keys in the metadata; no authentication without keys and key file."""
    max_request_bytes: int = 16 * 2**20
    """Largest message of a client."""
    shares_port: bool = False
    """Several processes listen on the port, and the kernel gives each connection to one of them."""
    api_key_file: str = ""
    """More keys, with names: proto/keys.py has the format."""


class PlacementConfig(Config):
    """How the scheduler chooses workers."""

    policy: str = "least_loaded"
    """least_loaded | round_robin."""


class SchedulerConfig(Config):
    """The scheduler process."""

    endpoint: str
    """The address it binds: an ipc endpoint, and a tcp one when workers on other hosts may join."""
    run_dir: str = ""
    network: NetworkConfig = NetworkConfig()
    """Its `host` is not used: `endpoint` says where."""
    max_waiting: int = 4096
    """Requests queued for a prefill worker; one more is rejected with 429."""
    placement: PlacementConfig = PlacementConfig()
    heartbeat_timeout_s: float = 10.0
    """No beat for so long: dead. A death on the same host is seen at once, through a pidfd."""
    stuck_factor: float = 20.0
    """A step running longer than this times its expectation (and 30 s at least) is stuck."""
    grace_s: float = 2.0
    """After a restart: how long claims and holdings may wait for their other half."""
    reconcile_after_s: float = 3.0
    """A stream absent from its worker's holdings for so long after its command was applied is retried."""
    expected_workers: int = 0
    """Not ready before so many workers are there (the launcher's count at start); 0: any that can serve."""
    log_interval_s: float = 10.0
    name: str = "scheduler"
    no_workers_s: float = 30.0
    """A request waits so long for workers that could serve it to come (back); then it is rejected."""
    admin: RpcConfig = RpcConfig()
    """The Admin service."""


class PoolerConfig(Config):
    """How embeddings are made."""

    pooling_type: str = ""
    """A Pooling; empty: what the checkpoint says in 1_Pooling/config.json, else LAST."""
    normalize: bool | None = None
    """To length 1; None: what the checkpoint says in modules.json, else yes."""
    matryoshka_dimensions: tuple[int, ...] | None = None
    """What a request's `dimensions` may be; empty: anything; None: what config.json says of the model's training."""


class TlsConfig(Config):
    """TLS of the HTTP server; flags and meaning are uvicorn's."""

    keyfile: str = ""
    """PEM file with the private key; may be empty when certfile has it too."""
    certfile: str = ""
    """PEM file with the certificate chain; empty: plaintext."""
    ca_certs: str = ""
    """PEM file with the authorities that clients' certificates are checked against."""
    cert_reqs: int = 0
    """Certificates of clients: 0 not asked for | 1 checked if there | 2 required."""


class CorsConfig(Config):
    """Which web pages may call the API from a browser; "*" is every one."""

    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    """Cookies and HTTP authentication that the browser adds by itself."""


class FrontendConfig(Config):
    """One frontend process."""

    name: str
    model: ModelConfig
    scheduler: str
    run_dir: str
    host: str = "0.0.0.0"
    port: int = 8000
    shares_port: bool = False
    """Other frontends listen on the same port; the kernel spreads connections over them."""
    uds: str = ""
    """Unix socket to serve HTTP on instead of host and port."""
    root_path: str = ""
    api_keys: tuple[str, ...] = ()
    """Bearer keys; no authentication without keys and key file."""
    max_logprobs: int = 20
    block_size: int = 16
    gap_timeout_s: float = 0.5
    """A row beyond the next expected position waits so long for the missing ones before the stream is retried."""
    resend_interval_s: float = 1.0
    """Unanswered Submit and Close are sent again this often."""
    stalled_client_s: float = 60.0
    """A client that reads nothing for so long, while an answer or a part of one is waiting for it, is aborted."""
    max_request_bytes: int = 16 * 2**20
    """Largest HTTP body."""
    max_pending_bytes: int = 256 * 2**20
    """Of all bodies that have not been read to the end; beyond it requests are answered with 503."""
    max_header_bytes: int = 64 * 2**10
    """Request line and headers of one request together."""
    head_timeout_s: float = 20.0
    """From the first byte of a request to the end of its headers; a connection that sends nothing has as long."""
    keep_alive_s: float = 120.0
    """An idle connection stays open for so long. Clients and proxies should be the ones to close it (httpx after 5 s,
    load balancers after 60, Go's client after 90): a request that is on its way when the server closes is lost."""
    body_timeout_s: float = 120.0
    """From the end of the headers to the end of the body."""
    shutdown_timeout_s: float = 15.0
    """After SIGTERM running streams may finish for so long."""
    grpc: RpcConfig = RpcConfig()
    """The Inference service."""
    network: NetworkConfig = NetworkConfig()
    enable_auto_tool_choice: bool = False
    """Whether the model may decide by itself to call tools; needs tool_call_parser."""
    tool_call_parser: str = ""
    """Finds the calls in what the model writes; its name in frontend/tools/registry.py, or in the plug-in."""
    reasoning_parser: str = ""
    """Tells reasoning from the answer."""
    tool_parser_plugin: str = ""
    """Python file with parsers of the user's own."""
    api_key_file: str = ""
    """More keys, with names: proto/keys.py has the format."""
    tls: TlsConfig = TlsConfig()
    cors: CorsConfig = CorsConfig()
    peers: tuple[str, ...] = ()
    """Names of the deployment's frontends, this one included; empty: it is the only one."""
    max_stored_responses: int = 1024
    """Of /v1/responses: so many that have ended are kept, and the oldest leaves first."""
    max_stored_response_bytes: int = 64 * 2**20
    """Which those may take together, as JSON."""
    pooler: PoolerConfig = PoolerConfig()
    """Of /v1/embeddings and what is built on it."""


class ServeConfig(Config):
    """Everything that `baton serve` starts."""

    scheduler: SchedulerConfig
    frontends: tuple[FrontendConfig, ...]
    workers: tuple[WorkerConfig, ...]
    run_dir: str
    """0700 directory that holds every socket; removed at the end."""
    shutdown_timeout_s: float = 15.0
    keepers: tuple[KeeperConfig, ...] = ()


T = TypeVar("T", bound=Config)


def encode(config: Config) -> bytes:
    """As JSON, for a child process."""
    return msgspec.json.encode(config)


def decode(data: bytes, kind: type[T]) -> T:
    """Inverse of encode; msgspec.ValidationError names the field that is wrong."""
    return msgspec.json.decode(data, type=kind)
