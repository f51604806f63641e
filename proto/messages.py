"""Every message that crosses a process boundary, and the closed union each socket decodes.

A message is one frozen msgspec struct, encoded as a msgpack array whose first element is the tag. Fields are only
appended, with defaults, so that an older peer can read a newer one. Bulk bytes (token ids, hashes) travel as extra
frames after the message, never inside it. Times named *_s are durations in seconds, those named *_at moments on the
scheduler's CLOCK_MONOTONIC. An address names every endpoint of a socket (address.py).

The rules behind the messages, and the failure each closes, are in docs/protocol.md.
"""

import msgspec

from baton.proto.layout import KVLayout

Sid = tuple[int, int]
"""Stream id: (frontend incarnation, number). One per output stream, never reused."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Base of all messages."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of structs that appear inside messages."""


# ---------------------------------------------------------------------------------------------------------------- parts


class SamplingParams(Record):
    """How tokens are drawn. Stop strings are not here: they belong to the frontend alone."""

    max_tokens: int
    """Output tokens at most, counted from prompt_len (a resumed stream keeps its budget)."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """64-bit key of the counter-based generator; the frontend draws one where the client gave none."""
    sample_index: int = 0
    """Which of a request's n samples this stream is; part of the generator's key."""
    min_tokens: int = 0
    """stop_token_ids are masked until this many output tokens exist."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the stream: the model's EOS ids (unless ignore_eos) and the client's."""
    logprobs: int = -1
    """-1 none, 0 the chosen token's, k also the k best."""
    logit_bias: dict[int, float] = {}
    grammar: str = ""
    """What the output must be, in llguidance's JSON form (proto/grammar.py). stop_token_ids are allowed only where it
    may end. Empty: anything."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that are drawn; empty: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output does not have: the last token of one is not drawn behind the others."""
    logprob_token_ids: tuple[int, ...] = ()
    """With logprobs: report these tokens in place of the k best."""
    prompt_logprobs: int = -1
    """-1 none, 0 those of the prompt's own tokens, k also the k best at each position."""
    pooling: str = ""
    """A Pooling: the prompt's vector is wanted and no tokens (max_tokens is 0). Empty: tokens."""

    @property
    def depends_on_output(self) -> bool:
        """Whether which tokens may come next depends on the last one."""
        if not self.bad_words:  # as nearly always; asked for each stream of each step
            return bool(self.grammar)
        return bool(self.grammar) or any(len(word) > 1 for word in self.bad_words)


class TokenLogprobs(Record):
    """Log-probabilities at one output position, from the unmodified logits (before temperature and penalties)."""

    logprob: float
    """Of the chosen token."""
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob): the best, best first, or those of logprob_token_ids in their order."""


class FirstRows(Record):
    """What the prefill leg sampled; the decode leg's first row repeats it, so that order of sockets does not matter."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


class Finish(Record):
    """The end of a stream at a worker. It counts at the frontend once `final` tokens have been accepted."""

    reason: str
    """A FinishReason."""
    final: int
    """Output tokens of the stream in all."""
    message: str = ""
    """For ERROR: what the client is told."""


class Ledger(msgspec.Struct, omit_defaults=True):
    """What was done for a request, by whom, why anything fell back. Workers send parts, the frontend merges them."""

    prefill_worker: str = ""
    decode_worker: str = ""
    computed_tokens: int = 0
    """Prompt tokens computed by the prefill leg."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefill worker's prefix cache."""
    decode_cached_tokens: int = 0
    """Prompt tokens found in the decode worker's prefix cache: not moved."""
    transport: str = ""
    """local | shm | … ; empty while nothing was handed over."""
    moved_blocks: int = 0
    moved_bytes: int = 0
    transfer_s: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    attempts: int = 1
    notes: list[str] = []
    """Why something fell back, one sentence each."""
    stages: dict[str, float] = {}
    """Stage -> seconds on the CLOCK_MONOTONIC of the scheduler's host."""
    client: str = ""
    """Name of the API key; empty without keys."""

    def merge(self, part: "Ledger") -> None:
        """Overlay the fields that `part` sets: a worker sends each field once per attempt."""
        for field, default in _LEDGER_DEFAULTS.items():
            value = getattr(part, field)
            if value != default:
                setattr(self, field, value)
        self.notes = [*self.notes, *part.notes]
        self.stages = {**self.stages, **part.stages}


_LEDGER_DEFAULTS = {
    name: getattr(Ledger(), name) for name in Ledger.__struct_fields__ if name not in ("notes", "stages", "attempts")
}


class Peer(Record):
    """Where a worker's lease socket and KV plane listen."""

    worker: str
    incarnation: int
    endpoint: str
    """Address of the worker's ROUTER for Open and Confirm."""
    kv_endpoint: str
    """Address at which it greets those who read its KV blocks: 'unix:/run/…/decode-0.kv tcp://10.0.0.5:41878'."""
    shared_pool: str = ""
    """The keeper's pool that its blocks lie in, when it swaps them; empty: they can only be copied."""


class Holder(Record):
    """Who may consume a lease."""

    worker: str
    incarnation: int
    sid: Sid
    attempt: int


class Holding(Record):
    """One stream that a worker keeps resources for."""

    sid: Sid
    attempt: int
    leg: str
    """prefill: it hands over, also while its lease lives | decode: it goes on to the stream's end."""


class Settings(Record):
    """What operators have made of a worker. The scheduler says what they should be, the worker what they are."""

    role: str = ""
    """A Role; empty: the one that it was started with."""
    duty: str = "active"
    """A Duty."""
    cache_flushes: int = 0
    """How often its prefix cache was to be emptied: a worker empties it when this changes."""
    log_level: str = ""
    """debug | info | warning | error; empty: as at the start."""


class KVLink(Record):
    """How a worker reads the KV blocks of another one."""

    owner: str
    """Name of the other one."""
    transport: str
    """As in --kv-transfer; empty when there is no way."""
    reason: str = ""
    """Why this one: empty for the best there is, else what kept the better ones, or all, from being used."""


class Claim(Record):
    """One open stream, as its frontend sees it after the scheduler came back."""

    sid: Sid
    attempt: int
    prompt_len: int
    request: str = ""
    """As in Submit."""


# ------------------------------------------------------------------------------------------------- frontend ⇄ scheduler


class FrontendHello(Message):
    """F→S, first message on a connection and the answer to WhoAreYou."""

    frontend: int
    """Incarnation, the first half of its sids."""
    name: str
    endpoint: str
    """Address to which workers deliver TokenBatch."""
    pid: int
    """Watched by the scheduler when the frontend is on the same host; 0 when it is not."""
    protocol: int
    claims: tuple[Claim, ...] = ()
    log_level: str = ""
    """What an operator has told it; empty: nothing."""
    scheduler_log_level: str = ""
    """As in the last ClusterStatus: a restarted scheduler logs as the one before it was told to."""


class Submit(Message):
    """F→S. Frames: int32 prompt ‖ accepted tokens; their hash chain, root first (hashing.hash_chain, pack_hashes).
    Resent until Accepted or Rejected."""

    sid: Sid
    attempt: int
    prompt_len: int
    """Tokens of the original prompt; the rest of the frame are accepted output tokens."""
    params: SamplingParams
    timeout_s: float = 0.0
    """Time left until the client's deadline; 0 is none."""
    priority: int = 0
    """Lower is served first, as in vLLM."""
    sibling: int = 0
    """Second half of the sid of an earlier stream with the same prompt: both go to one worker, if they share its blocks
    there. 0: none."""
    request: str = ""
    """What its client calls the request, for operators; empty: nothing."""


class Close(Message):
    """F→S, the end of a request, resent until CloseAck. The scheduler counts metrics from it."""

    sid: Sid
    attempt: int
    outcome: str
    prompt_tokens: int
    output_tokens: int
    ledger: Ledger
    part: bool = False
    """Of a request that takes many streams, a beam search: it has a Close of its own, and this one is not counted."""


class MetricsRequest(Message):
    """F→S: the cluster's metrics as Prometheus text."""

    request: int


class Accepted(Message):
    """S→F: the request is queued; it will end in exactly one Close."""

    sid: Sid
    attempt: int


class Rejected(Message):
    """S→F: not admitted; nothing was kept."""

    sid: Sid
    attempt: int
    code: str
    """A RejectCode."""
    message: str
    retry_after_s: float = 0.0


class Retry(Message):
    """S→F: this attempt can't go on; submit attempt + 1 with what you have accepted."""

    sid: Sid
    attempt: int
    reason: str


class Cancelled(Message):
    """S→F: an operator ended the stream, whatever its attempt; resent until Close."""

    sid: Sid
    message: str
    """For the client."""


class CloseAck(Message):
    """S→F."""

    sid: Sid


class MetricsReply(Message):
    """S→F."""

    request: int
    text: str


class WorkerStatus(Record):
    """One worker as the scheduler sees it."""

    worker: str
    incarnation: int
    role: str
    num_blocks: int
    free_blocks: int
    running: int
    waiting: int


class ClusterStatus(Message):
    """S→F after every change of membership: whether a request can be served, and by whom."""

    epoch: int
    ready: bool
    reason: str
    """What is missing when not ready."""
    workers: tuple[WorkerStatus, ...]
    log_level: str = ""
    """How much this frontend is to log: debug | info | warning | error; empty: as at the start."""
    scheduler_log_level: str = ""
    """How much the scheduler logs, kept for the next one; empty: as at the start."""


# --------------------------------------------------------------------------------------------------- scheduler ⇄ worker


class WorkerHello(Message):
    """W→S, first message on a connection and the answer to WhoAreYou. PrefillDone of unopened leases follow it."""

    worker: str
    """Name, e.g. prefill-0; unique in the cluster."""
    incarnation: int
    role: str
    pid: int
    protocol: int
    peer: Peer
    layout: KVLayout
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    holdings: tuple[Holding, ...] = ()
    settings: Settings = Settings()
    """As they are now: a restarted scheduler goes on with them."""
    host: str = ""
    """Name of its host, for operators."""
    pid_space: str = ""
    """Where its pid means something (proto/host.py)."""
    distant: bool = False
    """It speaks to the scheduler over TCP: what has no TCP endpoint is out of its reach."""
    epoch: int = 0
    """The highest that it has obeyed: the scheduler commands with a higher one."""


class WhoAreYou(Message):
    """S→W, S→F: the scheduler does not know this peer (it restarted, or the peer is new): say hello."""

    epoch: int


class Welcome(Message):
    """S→W, S→F: registered. Commands of lower epochs are refused from now on."""

    epoch: int


class Fenced(Message):
    """S→W: this incarnation was declared dead. Drop everything, take a new incarnation, say hello."""

    incarnation: int
    reason: str


class NotAdmitted(Message):
    """S→W, the answer to a hello: this worker can't be a member."""

    incarnation: int
    reason: str
    final: bool
    """False: it may say hello again, for what stands in its way may go."""


class ClockReply(Message):
    """S→W."""

    sent_s: float
    """From the request."""
    now_at: float
    clock_space: str
    """Where this clock is read (proto/host.py)."""


class StartPrefill(Message):
    """S→W. Frames: int32 prompt ‖ accepted; hash chain, root first."""

    epoch: int
    cmd_seq: int
    sid: Sid
    attempt: int
    prompt_len: int
    params: SamplingParams
    reply_to: str
    """The frontend's token-plane address."""
    continue_decode: bool
    """True: this worker also decodes (transport `local`, nothing is handed over). False: hold a lease when done."""
    priority: int = 0


class StartDecode(Message):
    """S→W. Frames: int32 prompt ‖ accepted (without first_rows); hash chain, root first."""

    epoch: int
    cmd_seq: int
    sid: Sid
    attempt: int
    prompt_len: int
    params: SamplingParams
    reply_to: str
    lease: int
    owner: Peer
    num_tokens: int
    """Tokens whose KV has settled at the owner so far; all of them when first_rows is given."""
    blocks: tuple[int, ...]
    """The owner's block ids that hold them, in order."""
    first_rows: FirstRows | None
    """None while the prefill is still running: Settled brings it."""
    priority: int = 0
    reported_at: float = 0.0
    """When PrefillDone reached the scheduler; 0 while the prefill is still running."""


class Configure(Message):
    """S→W: be as these settings say. Sent again as long as the worker's reports say otherwise."""

    epoch: int
    settings: Settings


class CancelCommand(Message):
    """S→W: free what this attempt (and every older one) holds. Also when it overtakes its Start."""

    epoch: int
    cmd_seq: int
    sid: Sid
    attempt: int


class Load(Message):
    """W→S after a change, at most every load_interval_s; with holdings at least every holdings_interval_s."""

    last_cmd_seq: int
    """The scheduler adds its own later promises to these figures."""
    used_blocks: int
    """Held by requests or leases; merely cached ones are free."""
    free_blocks: int
    running: int
    waiting: int
    queued_tokens: int
    """Prompt tokens not yet computed."""
    leases: int
    computed_tokens: int
    """Counter since start: prompt tokens computed."""
    cached_tokens: int
    """Counter: prompt tokens found in the prefix cache."""
    pulled_tokens: int
    """Counter: tokens whose KV came from another worker."""
    generated_tokens: int
    """Counter: tokens sampled."""
    preemptions: int
    """Counter."""
    holdings: tuple[Holding, ...] | None = None
    """All streams this worker keeps, for reconciliation; None in the light reports between."""
    settings: Settings | None = None
    """As they are, beside the holdings."""
    links: tuple[KVLink, ...] | None = None
    """To every worker whose blocks it reads, or could not read; beside the holdings."""
    pooled_vectors: int = 0
    """Counter: vectors made for requests that want one instead of tokens."""


class ClockRequest(Message):
    """W→S: what time is it? Once, and every second from a worker whose clock is another one."""

    sent_s: float
    """The asker's CLOCK_MONOTONIC."""


class Progress(Message):
    """P→S: part of a long prompt has settled and may be read, or all of it is being computed by now; asks for early
    binding. Not for continue_decode."""

    sid: Sid
    attempt: int
    lease: int
    num_tokens: int
    """Settled."""
    total_tokens: int
    blocks: tuple[int, ...]
    tokens_per_s: float
    """Current prefill speed, to judge when the rest takes about one transfer."""


class PrefillDone(Message):
    """P→S: every block has settled and the first token was sent to the frontend; the lease is READY."""

    sid: Sid
    attempt: int
    lease: int
    num_tokens: int
    blocks: tuple[int, ...]
    first_rows: FirstRows


class FirstToken(Message):
    """W→S for continue_decode: the prefill is over and the stream decodes on."""

    sid: Sid
    attempt: int


class Ended(Message):
    """W→S: the worker holds nothing for this leg any more."""

    sid: Sid
    attempt: int
    leg: str
    retry: str = ""
    """Empty: done, handed over or cancelled. Else why the attempt can't go on: the frontend must retry."""


class Refused(Message):
    """W→S: the command was not carried out and will not be; another target may be tried under the same attempt."""

    sid: Sid
    attempt: int
    leg: str
    reason: str


class Goodbye(Message):
    """W→S, F→S: leaving in order (drained or stopped); not a crash."""

    name: str
    incarnation: int


class Beat(Message):
    """W→S, F→S, from a thread with its own socket. No beat is dead; a step far beyond its expectation is stuck."""

    name: str
    incarnation: int
    step: int = 0
    step_running_s: float = 0.0
    """How long the step in flight has run; 0 when idle."""
    expected_s: float = 0.0


# ---------------------------------------------------------------------------------------------------- worker ⇄ frontend


class TokenBatch(Message):
    """W→F, one per step and frontend; columnar. An empty one is the idle beat that makes a lost last batch visible.
    Frames: one for each entry of prompt_logprobs, in their order (PromptLogprobs.data); then, if there are vectors, one
    with all of them: float32, little-endian, all of one length."""

    worker: str
    incarnation: int
    seq: int
    """Counts the non-empty batches of this channel; an idle beat repeats the last one's."""
    n: tuple[int, ...] = ()
    """Second half of each row's sid."""
    attempt: tuple[int, ...] = ()
    pos: tuple[int, ...] = ()
    """Output index of the row's first token."""
    count: tuple[int, ...] = ()
    """Tokens in the row."""
    tokens: tuple[int, ...] = ()
    """All rows' tokens, concatenated."""
    finish: dict[int, Finish] = {}
    """Row -> end of stream."""
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    """Row -> one entry per token of the row."""
    ledgers: dict[int, Ledger] = {}
    """Row -> part of the request's ledger."""
    prompt_logprobs: dict[int, int] = {}
    """Row -> alternatives per token, for the row with a stream's first token: PromptLogprobs.top."""
    vectors: tuple[int, ...] = ()
    """Rows that end with a pooled vector instead of tokens, in the order of the vectors in the frame."""
    frontend: int = 0
    """First half of each row's sid: the incarnation that it is for. Another one may have got its TCP port since."""


class CancelStream(Message):
    """F→W: nobody reads this attempt (or older ones) any more; free it."""

    sid: Sid
    attempt: int


# ------------------------------------------------------------------------------------------------------ worker ⇄ worker


class Open(Message):
    """D→P: I hold this lease. Sent when the pull begins and every renew_interval_s as the renewal; answered by Settled
    or Gone."""

    owner_incarnation: int
    lease: int
    holder: Holder


class Confirm(Message):
    """D→P: my copy is complete; may I use it? Answered by Ok or Gone; resent until answered."""

    owner_incarnation: int
    lease: int
    holder: Holder
    targets: tuple[int, ...] = ()
    """Instead of a copy: these blocks of the holder's, as many as the lease will have, for the lease's. It may come
    before the last of them has settled; the keeper's Swapped says whether it came to that."""


class Settled(Message):
    """P→D: these tokens' blocks may be read. Pushed after each chunk and sent in answer to Open."""

    holder: Holder
    lease: int
    num_tokens: int
    blocks: tuple[int, ...]
    first_rows: FirstRows | None
    """Given when the prefill is complete."""


class Ok(Message):
    """P→D: what you copied was valid, and is yours; or the keeper has been asked to swap."""

    holder: Holder
    lease: int
    first_rows: FirstRows | None = None
    """For a holder whose targets came before the last block had settled: the Settled with them may be lost."""


class Gone(Message):
    """P→D: unknown, expired, cancelled or someone else's. Discard what was copied."""

    holder: Holder
    lease: int


# ----------------------------------------------------------------------------------------------- worker and keeper


class Memory(Record):
    """Device memory that a keeper has allocated."""

    num_bytes: int
    handle: bytes
    """What maps it in another process."""
    ready: bool
    """Whether it holds what its key says."""


class TakeTurn(Message):
    """W→K, the first message of a process: it wants to load and measure with no other doing so. Answered by Turn once
    it is its turn and every earlier process of the same name is gone."""

    worker: str
    pid: int


class Turn(Message):
    """K→W: nobody else loads or measures until this process says EndTurn, or dies."""

    pid: int
    """The keeper's: when it ends, its memory has no master any more."""
    shared_pool: str
    """Names the pool for this life of the keeper."""
    memories: dict[str, Memory]
    notes: dict[str, bytes]


class Allocate(Message):
    """W→K, in its turn: memory under a new key. What is not Filled when the turn ends is freed. Answered by
    Allocated."""

    key: str
    num_bytes: int
    num_blocks: int = 0
    """Above 0: it is the pool of KV blocks, to be divided among the workers; it needs no filling."""


class Allocated(Message):
    """K→W: here it is, or why not."""

    memory: Memory | None
    error: str = ""


class Filled(Message):
    """W→K: the memory under this key holds what it should."""

    key: str


class Note(Message):
    """W→K: something small that later processes need not find out again."""

    key: str
    data: bytes


class EndTurn(Message):
    """W→K: the next one may load."""


class Join(Message):
    """W→K: a new incarnation of the worker begins; whatever the one before had asked for is void. Answered by Share."""

    incarnation: int


class Share(Message):
    """K→W: the blocks that this worker owns, int32 in an extra frame."""


class Swap(Message):
    """P→K: a lease was confirmed against targets. Answered by Swapped, to both sides."""

    owner_incarnation: int
    lease: int
    holder_incarnation: int
    give: tuple[int, ...]
    """The owner's blocks, which the holder gets."""
    take: tuple[int, ...]
    """The holder's, which the owner gets."""
    oldest: int = 0
    """The owner remembers no lease before this one and will ask for none of them."""


class Withdraw(Message):
    """D→K: the holder wants its targets back. Answered by a Swapped that says no, unless one that says yes has been
    sent before."""

    owner_incarnation: int
    lease: int


class Swapped(Message):
    """K→P and D: whether the blocks of this lease have changed hands. Until it comes, both sides keep their own away
    from everything else."""

    owner_incarnation: int
    lease: int
    done: bool
    blocks: tuple[int, ...] = ()
    """What the receiver has got."""


class Prompts(Message):
    """W→K: the oldest prompt in this worker's steps; K→W: in those of all others. Sent when it changes."""

    since: float | None
    """When it came, on the host's monotonic clock; None: there is none."""


# --------------------------------------------------------------------------------------------------- who reads what

ToScheduler = (
    FrontendHello
    | Submit
    | Close
    | MetricsRequest
    | WorkerHello
    | Load
    | ClockRequest
    | Progress
    | PrefillDone
    | FirstToken
    | Ended
    | Refused
    | Goodbye
    | Beat
)
ToFrontend = Accepted | Rejected | Retry | Cancelled | CloseAck | MetricsReply | ClusterStatus | WhoAreYou | Welcome
ToFrontendTokens = TokenBatch
ToWorker = (
    WhoAreYou | Welcome | NotAdmitted | Fenced | ClockReply | StartPrefill | StartDecode | CancelCommand | Configure
)
ToWorkerFromFrontend = CancelStream
ToOwner = Open | Confirm
ToHolder = Settled | Ok | Gone
ToKeeper = TakeTurn | Allocate | Filled | Note | EndTurn | Join | Swap | Withdraw | Prompts
FromKeeper = Turn | Allocated | Share | Swapped | Prompts
