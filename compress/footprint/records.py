"""What `dscompress plan` says, as `--json` writes it. Sizes are bytes; None means that it can't be said, never zero."""

from compress.record_types import Count, Typed


class Subject(Typed):
    """The model. `told` says from what: headers (to the byte), gguf or config; `stored_bytes`: its weights there."""

    name: str
    model_type: str
    parameters: Count
    active_parameters: Count
    positions: Count | None
    stored_bytes: Count | None
    told: str
    notes: tuple[str, ...]


class Cache(Typed):
    """The KV cache of all sequences, in bf16 and in fp8.

    `shared_by`: over how many cards heads can be spread. With `latent`, one latent serves all heads (MLA), and each
    card holds it whole; `expanded_bytes` is for a program that keeps keys and values of each head.
    """

    bytes: Count
    fp8_bytes: Count
    bytes_per_token: Count
    heads: Count
    shared_by: tuple[int, ...]
    latent: bool
    expanded_bytes: Count | None


class Loss(Typed):
    """KL divergence from the base in nats a token, measured on another model than this."""

    least: float
    most: float
    model: str
    how: str


class Row(Typed):
    """A precision. What hangs on a card is None without one.

    `cards` is how many of each named card hold it; None: not eight, they can't share it, or what runs there unpacks it.
    `read_bytes` are the weights that one token needs; `ms_per_token` is a floor and `tokens_per_second` a ceiling, both
    of one sequence, from bandwidth alone. `problem` says why the model can't have it; then nothing else is known.
    """

    precision: str
    made_by: str
    openers: str
    about: bool
    format: str | None = None
    weights_bytes: Count | None = None
    read_bytes: Count | None = None
    file_bytes: Count | None = None
    cache_bytes: Count | None = None
    activation_bytes: Count | None = None
    total_bytes: Count | None = None
    fits: bool | None = None
    has_kernels: bool | None = None
    longest_context: Count | None = None
    largest_batch: Count | None = None
    ms_per_token: float | None = None
    tokens_per_second: float | None = None
    cards: dict[str, int | None] = {}
    loss: Loss | None = None
    problem: str | None = None


class Training(Typed):
    """Bytes of each GPU for one way of training, by the number of GPUs that share it (FSDP2)."""

    way: str
    bytes: dict[int, Count]


class Card(Typed):
    """What is planned for: a card, or memory alone. `keeps_codes`: whether what runs there keeps codes packed."""

    name: str
    memory_bytes: Count
    usable_bytes: Count
    bandwidth: float | None
    formats: tuple[str, ...]
    keeps_codes: bool


class Advice(Typed):
    """What to do: `precision` is None where nothing fits; `command` makes it: the bundled recipe with settings."""

    text: str
    precision: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    command: str | None = None


class Footprint(Typed):
    """All of it."""

    model: Subject
    context: Count
    batch: Count
    chunk: Count
    card: Card | None
    cache: Cache
    rows: tuple[Row, ...]
    training: tuple[Training, ...]
    training_note: str
    advice: Advice | None
