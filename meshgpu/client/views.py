"""What the control API answers, as types. Times are Unix seconds, sizes bytes; None where not known or not yet."""

from typing import Literal, TypedDict


class MeshView(TypedDict):
    id: str
    name: str


class AgentView(TypedDict):
    """The agent itself. mesh and user are None before `init` or `join`; fence is empty where nothing shuts jobs in.

    lending: `polite shared dedicated`.
    wanted_port: what the configuration says, which link_port is unless it was taken; 0: any.
    """

    version: str
    pid: int
    home: str
    node: str
    name: str
    mesh: MeshView | None
    user: str | None
    link_port: int
    wanted_port: int
    addresses: list[str]
    fence: str
    lending: str
    gpus: list[str]
    gpu_note: str
    started_at: float


class FoundedView(TypedDict):
    mesh: str
    name: str
    node: str
    user: str
    recovery_key: str


class InviteView(TypedDict):
    """invite: a secret. uses: how many machines it lets in."""

    invite: str
    expires_at: float
    user: str
    role: str
    uses: int


class JoinedView(TypedDict):
    mesh: str
    name: str
    node: str
    user: str
    inviter: str
    role: str
    fence: str
    gpus: list[str]


class DigitsEvent(TypedDict):
    """Digits to compare. other: the joining machine, or the mesh it joins; user: whose the machine will be."""

    type: Literal["digits"]
    digits: str
    other: str
    user: str
    role: str


class FailedEvent(TypedDict):
    """A comparison ended without an admission; the window is still open."""

    type: Literal["failed"]
    why: str


class AdmittedEvent(TypedDict):
    type: Literal["admitted"]
    name: str
    user: str
    role: str


class JoinedEvent(JoinedView):
    type: Literal["joined"]


class WaitEvent(TypedDict):
    """The agent is here; nothing new."""

    type: Literal["wait"]


class RevokedView(TypedDict):
    name: str
    node: str
    owner: str


class RoleView(TypedDict):
    name: str
    node: str
    role: str


class AdminView(TypedDict):
    """An account that may change the mesh; key: its id."""

    user: str
    machine: str
    key: str


class AdminsView(TypedDict):
    """candidates: who could become one, on other machines; first who would be the wisest choice."""

    admins: list[AdminView]
    candidates: list[AdminView]


class LeftView(TypedDict):
    mesh: str


class RenewedView(TypedDict):
    """A machine under new keys. node: its id now; before: the one it gave up. away: who has yet to hear of it."""

    name: str
    node: str
    before: str
    away: list[str]


class SightingView(TypedDict):
    """A machine that announces itself nearby. ours: it is a member of our mesh; gpus: `2x RTX 4090 24GB`."""

    node: str
    name: str | None
    mesh_name: str | None
    mesh_tag: str | None
    ours: bool
    self: bool
    pairing: bool
    addresses: list[str]
    gpus: str | None


class GpuJobView(TypedDict):
    """A job that has a GPU or a part of it. waits: it is only kept free for the job."""

    id: str
    display: str
    user: str
    waits: bool


class GpuView(TypedDict):
    """A GPU with its last reading; fault, withheld: empty, or why it cannot be used, or is not lent now."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int | None
    utilization_percent: int | None
    temperature_c: int | None
    power_w: float | None
    fault: str
    withheld: str
    jobs: list[GpuJobView]


class MachineView(TypedDict):
    """A member and its GPUs. state: `alive suspect down left revoked`; down_s: seconds since its Link was lost.

    heard_s: since it last said something itself; capacity_s: since its capacity was heard, from anybody; else None.
    jobs: how many run there or are about to, those without a GPU included. doubted_by: machines to which it does not
    answer either. load: processors busy or waited for during the last minute, as it said itself.
    cloned: whether two agents run with its keys, so that it is given no work.

    lending: `polite shared dedicated`. paused: its owner lends nothing, until paused_until, or until he says so (None).
    """

    name: str
    id: str
    state: str
    self: bool
    roles: list[str]
    owner: str | None
    cpus: int
    memory_bytes: int
    fence: str
    lending: str
    paused: bool
    paused_until: float | None
    gpu_note: str
    down_s: float | None
    version: str
    address: str
    load: int | None
    jobs: int
    heard_s: float | None
    capacity_s: float | None
    doubted_by: list[str]
    cloned: bool
    gpus: list[GpuView]


class MachinesView(TypedDict):
    machines: list[MachineView]


class TreeView(TypedDict):
    """A tree that the agent took in; missing: digests of the chunks it does not have yet."""

    tree: str
    missing: list[str]


class JobGpuView(TypedDict):
    uuid: str
    name: str
    memory_bytes: int


class MetricView(TypedDict):
    """What a job reports of its objective; None while it has reported nothing. goal: `min max`."""

    name: str
    goal: str
    last: float | None
    best: float | None
    step: int | None


class TrialView(TypedDict):
    """Which point of a sweep's space; values by the parameters' names."""

    number: int
    values: dict[str, str]


class SpaceView(TypedDict):
    """What a sweep tries. method: `grid random`."""

    method: str
    params: list[str]
    trials: int
    parallel: int
    seed: int


class JobView(TypedDict):
    """A job as its user sees it. phase is None unless the job is active; exit_code None where no process ended.

    sweep, trial: the id of the sweep that it is a trial of, and which; space: for a sweep itself. died: attempts that
    died after they started, of which `retries` are forgiven. cloud: `never ok only`: whether it may leave the office.
    secrets: names of variables that only machines it may run on can read. shared: whether every user may see it.
    timeout_s: for how long its command may run; timed_out: whether it ran longer, and was ended for that.
    start_by: when it must have started for the first time, by the clocks of those that hold it; None: whenever.
    """

    id: str
    display: str
    name: str
    user: str
    state: str
    phase: str | None
    detail: str
    machine: str | None
    epoch: int
    exit_code: int | None
    reason: str
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    command: str
    gpus: list[JobGpuView]
    gpu_request: str
    out_of_touch_s: float | None
    held_by: list[str]
    output_files: int
    output_bytes: int
    tree_files: int
    tree_bytes: int
    requested_machine: str | None
    on: str
    priority: str
    preemptible: bool
    cloud: str
    retries: int
    died: int
    metric: MetricView | None
    sweep: str | None
    trial: TrialView | None
    space: SpaceView | None
    secrets: list[str]
    shared: bool
    timeout_s: float | None
    timed_out: bool
    start_by: float | None


class SweepView(TypedDict):
    """A sweep and the trials that have begun, by number."""

    sweep: JobView
    trials: list[JobView]
    silent: list[str]


class JobsView(TypedDict):
    """silent: names of the machines that did not answer in time."""

    jobs: list[JobView]
    silent: list[str]


class GpuVerdictView(TypedDict):
    """Whether one GPU would serve the job now. rule: `lacks faulty busy`, None where it would, as takes says."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    takes: bool
    rule: str | None
    refusal: str
    remedy: str


class MachineVerdictView(TypedDict):
    """Whether a machine would take the job now, and on which GPUs (gives: uuids).

    rule: that of a GPU, or `elsewhere closed cloned down unknown`. remedy: what would change the refusal.
    gpus: empty where the job asks for none, or the machine has not said yet what it has.
    """

    name: str
    takes: bool
    rule: str | None
    refusal: str
    remedy: str
    gives: list[str]
    gpus: list[GpuVerdictView]


class WhyView(TypedDict):
    """machines: of the whole mesh, by name. before: {user: how many of his jobs go first, at most} while the job waits.

    Both as the asked agent knows them.
    """

    job: JobView
    machines: list[MachineVerdictView]
    before: dict[str, int]


class SweepRequest(TypedDict):
    """params: texts as `lr=1e-4,1e-3`. trials: 0 for all of a grid."""

    method: str
    params: list[str]
    trials: int
    parallel: int
    seed: int


class JobRequest(TypedDict):
    """What `run` asks for. gpus: the text of `-g`, None without; texts: empty without; numbers: 0 where not said.

    cloud: None where nothing is said. sweep: None for a job of its own.
    metric: `loss:min`, empty without; metric_pattern: where it is in the log. shared: every user may see the job.
    secrets: {variable: value}, for the agent's eyes only: never to be printed. timeout_s: None for no limit.
    start_by: Unix time at which it must have started; None: whenever.
    """

    name: str
    command: list[str]
    shell: bool
    env: dict[str, str]
    pip: list[str]
    requirements: str
    from_project: bool
    tree: str
    machine: str
    gpus: str | None
    cpus: int
    memory_bytes: int
    on: str
    not_on: str
    image: str
    cloud: str | None
    retries: int
    sweep: SweepRequest | None
    metric: str
    metric_pattern: str
    secrets: dict[str, str]
    shared: bool
    priority: str
    preemptible: bool
    timeout_s: float | None
    start_by: float | None


class ShippingEvent(TypedDict):
    """How much of the tree has reached the machines that keep it."""

    type: Literal["shipping"]
    done_bytes: int
    total_bytes: int


class JobEvent(TypedDict):
    type: Literal["job"]
    job: JobView


class LogEvent(TypedDict):
    """A piece of the log; undecodable bytes are lone surrogates (PEP 383). position: where to resume after it.

    at: Unix time in seconds at which its machine took it.
    """

    type: Literal["log"]
    stream: Literal["stdout", "stderr"]
    at: float
    data: str
    position: int


class DroppedEvent(TypedDict):
    """So many bytes of the log, before what comes next, are not kept any more; 0 only says where it begins."""

    type: Literal["dropped"]
    bytes: int
    position: int


class TailEvent(TypedDict):
    """The machine that has the log has not answered for `seconds`; what follows, `bytes` of it, it told others last."""

    type: Literal["tail"]
    machine: str
    seconds: float
    bytes: int


class LogRequest(TypedDict, total=False):
    """Which part of a log is wanted; all of the newest attempt's where nothing is said.

    lines: the newest so many. since: from this Unix time on, in seconds. stream: one of both. attempt: from 1.
    """

    lines: int
    since: float
    stream: Literal["stdout", "stderr"]
    attempt: int


class OutOfTouchEvent(TypedDict):
    type: Literal["out-of-touch"]
    machine: str
    seconds: float


class EndEvent(TypedDict):
    type: Literal["end"]
    job: JobView


SubmitEvent = ShippingEvent | JobEvent
FollowEvent = JobEvent | LogEvent | DroppedEvent | TailEvent | OutOfTouchEvent | EndEvent


class FileView(TypedDict):
    path: str
    size_bytes: int


class CheckView(TypedDict):
    """One check of `doctor`. state: `ok`, `warn`, `fail`, or `skipped` where it was not tried or is about nothing here.

    ok: the same for programs: True, False where it failed, else None. hint: what mends it.
    """

    name: str
    state: str
    ok: bool | None
    found: str
    hint: str | None


class ChecksView(TypedDict):
    checks: list[CheckView]


class RuleView(TypedDict):
    """What a firewall has to let through; direction: `out` or `both`."""

    port: int
    protocol: str
    direction: str
    peer: str
    purpose: str


class FirewallView(TypedDict):
    """ufw, firewalld: commands."""

    rules: list[RuleView]
    ufw: list[str]
    firewalld: list[str]


class AuditEntryView(TypedDict):
    """One entry of a machine's audit. fault: why it cannot be read, and then it is all there is; else None.

    outcome, exit_code, receipt (digest): None before the end.
    """

    seq: int
    at: float
    event: str
    job: str
    name: str
    epoch: int
    user: str
    key: str
    spec: str
    fenced: bool
    gpus: list[str]
    outcome: str | None
    exit_code: int | None
    receipt: str | None
    fault: str | None


class AuditVerdictView(TypedDict):
    """What came of checking all of it. head: digest of the newest entry. fault: None, or the first that is wrong."""

    count: int
    head: str | None
    fault: str | None


class ReceiptFacts(TypedDict):
    """What is signed: by the user what was to run, by the machine what ran. Digests are SHA-256."""

    mesh: str
    job: str
    name: str
    user: str
    user_key: str
    command: str
    image_asked: str
    attempt: int
    node: str
    fenced: bool
    gpus: list[str]
    driver: str
    request: str
    code: str
    environment: str
    image: str
    outcome: str
    exit_code: int | None
    started_at: float | None
    ended_at: float
    log: str


class ReceiptCheckView(TypedDict):
    """holds: None where it could not be looked at."""

    about: str
    holds: bool | None
    found: str


class ReceiptView(TypedDict):
    """facts: None where a signature does not hold. proof: the signed bytes, base64; holds: whether no check failed."""

    facts: ReceiptFacts | None
    proof: str
    checks: list[ReceiptCheckView]
    holds: bool


class CapsView(TypedDict):
    """What a burst peer may spend, in US dollars. instances: at a time; lease_s: how long one lives at most."""

    usd_per_hour: float
    usd_per_day: float
    usd_per_month: float
    usd_per_job: float
    instances: int
    on_demand: bool
    lease_s: float


class BurstSettingsView(TypedDict):
    """How a machine rents. image, security_group: empty for the seller's own."""

    region: str
    caps: CapsView
    instance_types: list[str]
    burst_after_s: float
    idle_s: float
    no_contact_s: float
    image: str
    security_group: str
    install: str


class RentedView(TypedDict):
    """An instance that lives, or may. instance: None until it is known; machine: its name, once it is a member.

    state: of this machine's own `asked rented enrolled joined ending`, of another's `pending running ending`.
    owner: the machine that rents it, None where it is not known; market: `spot on-demand`. reason: why it ends.
    job: the id of the job for which it was rented; since: when it was launched.
    """

    launch: str
    instance: str | None
    instance_type: str
    market: str
    usd_per_hour: float
    job: str
    owner: str | None
    machine: str | None
    state: str
    reason: str
    address: str
    since: float
    lease_ends_at: float
    lease_left_s: float


class BurstView(TypedDict):
    """How renting stands on a machine. settings: None where it was never set up. role: `burst`, or what it is instead.

    may_leave: whether jobs may leave the office. rents: that it shall. usd_today, usd_this_month: what was spent with
    what may still be, in UTC; usd_per_hour: of all that lives. surveyed_s: how long ago the seller was asked last.
    problem: what went wrong last, empty without.
    """

    machine: str
    role: str
    may_leave: bool
    rents: bool
    settings: BurstSettingsView | None
    usd_per_hour: float
    usd_today: float
    usd_this_month: float
    surveyed_s: float | None
    problem: str
    rented: list[RentedView]


class RungView(TypedDict):
    """What can be asked for; usd_per_hour: at most. gpu_memory_bytes: of one GPU."""

    instance_type: str
    zone: str
    market: str
    gpu_name: str
    gpus: int
    gpu_memory_bytes: int
    cpus: int
    memory_bytes: int
    usd_per_hour: float


class PlanView(TypedDict):
    """What would be rented for a job now: rung, at worst for `usd`; None for nothing. words: why, or why not.

    again_s: in how long it is looked at again; None where only an event can change it.
    """

    job: str
    gpu_request: str
    waits_since: float
    rung: RungView | None
    usd: float
    words: str
    again_s: float | None


class PlansView(BurstView):
    """How renting stands, and a plan for each job that waits, the oldest first."""

    plans: list[PlanView]


AdmitEvent = DigitsEvent | FailedEvent | AdmittedEvent | WaitEvent
CompareEvent = DigitsEvent | JoinedEvent | WaitEvent
