"""The API of a local EC2: moto, and in front of it what moto lacks.

Added are idempotent ClientTokens, prices, the GPU image's parameter, errors and lost replies on demand, things done at
moments of a call, terminated instances that vanish, a caller's own address, and the log of all calls. Facts: EC2 API
reference, and what `../shared/research/cloud_gpu.md` §7 measured of moto.
"""

import base64
import ctypes
import hashlib
import io
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

REGION: Final = "us-east-1"
NAMESPACE: Final = "http://ec2.amazonaws.com/doc/2016-11-15/"
IMAGE: Final = "ami-0d1a000000000d1a0"
CLONE_NEWNET: Final = 0x40000000

PRICES: Final = {"g4dn.xlarge": 0.526, "g5.xlarge": 1.006, "g6.xlarge": 0.8048, "g6.12xlarge": 4.602}
"""US dollars an hour on demand (us-east-1, 2026-07-20)."""

SPOT_PRICES: Final = {("g5.xlarge", "us-east-1a"): 0.4507, ("g6.xlarge", "us-east-1b"): 0.3311}

Environment = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]
Answer = tuple[str, list[tuple[str, str]], bytes]


class Hypervisor(Protocol):
    """What the API does to machines. Called in the API's threads."""

    def boot(self, instance: str, public: str, private: str, user_data: bytes) -> None: ...

    def terminate(self, instance: str) -> None: ...

    def allow(self, rules: list[tuple[str, int]]) -> None:
        """The inbound TCP rules of all security groups: (CIDR, port)."""
        ...


class NoMachines:
    """For tests that ask for nothing but answers."""

    def boot(self, instance: str, public: str, private: str, user_data: bytes) -> None: ...

    def terminate(self, instance: str) -> None: ...

    def allow(self, rules: list[tuple[str, int]]) -> None: ...


@dataclass
class Fault:
    """What happens to the next calls that match. times: how many, -1 for all. loses_reply: it happens, but says 503.

    where: fields of the request, as EC2's query API names them.
    """

    action: str
    code: str = "Unavailable"
    status: int = 400
    where: Mapping[str, str] = field(default_factory=dict)
    times: int = 1
    loses_reply: bool = False


class Stage(StrEnum):
    """How far a call has come. arrived: nothing happened yet. done: it happened or was refused, but the caller was not
    told. told: the last byte of the answer was sent.
    """

    ARRIVED = "arrived"
    DONE = "done"
    TOLD = "told"


@dataclass
class Moment:
    """What a test does when the next call of an action has come so far; once. The call goes on when `do` returns.

    do: called in a thread of the API; until `told`, no other call happens meanwhile. To kill the caller before anything
    happened takes a Fault besides: a request that has arrived happens, whether or not its caller lives.
    """

    action: str
    stage: Stage
    do: Callable[[], None]


class LocalEc2:
    """Answers on `url` from the moment it is made until `close`. Equal to one account with one region.

    most_live: how many instances cost money at one time, at most; may be set back.
    """

    def __init__(self, hypervisor: Hypervisor | None = None, host: str = "127.0.0.1", namespace: str = "") -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._hypervisor = hypervisor or NoMachines()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.RLock()
        self.forget()
        self._listener = listen_in(namespace, host)
        port = self._listener.getsockname()[1]
        self._server = make_server(host, port, self._answer, threaded=True, fd=self._listener.fileno())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="local-ec2")
        self._thread.start()
        self.url = f"http://{host}:{port}"

    def forget(self) -> None:
        """Be as new: an account in which nothing ever lived. Machines that run are not ended."""
        self.faults: list[Fault] = []
        self.moments: list[Moment] = []
        self.calls: list[dict[str, str]] = []
        self.on_demand = dict(PRICES)
        self.spot = dict(SPOT_PRICES)
        self.vanish_s = 3600.0
        self.most_live = 0
        self._tokens: dict[str, tuple[str, Answer]] = {}
        self._ended: dict[str, float] = {}
        ec2_backends[DEFAULT_ACCOUNT_ID][REGION].reset()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._listener.close()

    def environment(self) -> dict[str, str]:
        """For programs that shall rent here, with credentials that are none."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def actions(self, action: str) -> list[dict[str, str]]:
        """The calls of one action so far, as they came."""
        with self._lock:
            return [call for call in self.calls if call["Action"] == action]

    def live(self) -> list[str]:
        """Instances that cost money."""
        with self._lock:
            return [found.id for found in self._instances() if found.state != "terminated"]

    def powered_off(self, instance: str) -> None:
        """The machine ended by itself: `InstanceInitiatedShutdownBehavior` says what that means."""
        with self._lock:
            self._end([instance])

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _answer(self, environment: Environment, start: StartResponse) -> Iterable[bytes]:
        body = environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        target = environment.get("HTTP_X_AMZ_TARGET", "")
        if environment["REQUEST_METHOD"] == "GET" and environment["PATH_INFO"] == "/":
            return _reply(start, environment["REMOTE_ADDR"] + "\n", "text/plain")
        if target.endswith(".GetProducts"):
            return _reply(start, self._products(json.loads(body)))
        if target == "AmazonSSM.GetParameter":
            name = json.loads(body)["Name"]
            return _reply(start, json.dumps({"Parameter": {"Name": name, "Type": "String", "Value": IMAGE}}))
        form = dict(parse_qsl(body.decode("latin-1"), keep_blank_values=True))
        form.setdefault("Action", target)
        with self._lock:
            self.calls.append(form | {"Authorization": environment.get("HTTP_AUTHORIZATION", "")})
            self._come(form["Action"], Stage.ARRIVED)
            answer = self._ec2(environment, body, form, start)
            self._come(form["Action"], Stage.DONE)
        return _Answer(answer, lambda: self._come(form["Action"], Stage.TOLD))

    def _ec2(
        self, environment: Environment, body: bytes, form: dict[str, str], start: StartResponse
    ) -> Iterable[bytes]:
        action = form["Action"]
        self._vanish()
        token = form.get("ClientToken", "") if action == "RunInstances" else ""
        sense = hashlib.sha256(repr(sorted(form.items())).encode()).hexdigest()
        if token in self._tokens:
            before, answer = self._tokens[token]
            if before != sense:
                return _refuse(start, "IdempotentParameterMismatch", "other arguments than in the previous request")
            return self._pass_on(start, answer)
        fault = self._fault(form)
        if fault is not None and not fault.loses_reply:
            return _refuse(start, fault.code, "as the test wants it", fault.status)
        if action == "DescribeSpotPriceHistory":
            return _reply(start, self._spot_history(form), "text/xml")
        living = {found.id for found in self._instances() if found.state != "terminated"}
        answer = self._ask_moto(environment, body)
        if answer[0].startswith("200"):
            if token:
                self._tokens[token] = (sense, answer)
            self._act(form, living)
        if fault is not None:
            return _refuse(start, "Unavailable", "The service is unavailable. Please try again shortly.", 503)
        return self._pass_on(start, answer)

    def _pass_on(self, start: StartResponse, answer: Answer) -> Iterable[bytes]:
        start(answer[0], answer[1])
        return [answer[2]]

    def _ask_moto(self, environment: Environment, body: bytes) -> Answer:
        said: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], _error: object = None) -> None:
            said[:] = [status, headers]

        inner = environment | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        content = b"".join(self._moto(inner, start))
        return said[0], said[1], content

    def _fault(self, form: Mapping[str, str]) -> Fault | None:
        for fault in self.faults:
            if (
                fault.action == form["Action"]
                and fault.times != 0
                and all(form.get(name) == value for name, value in fault.where.items())
            ):
                fault.times -= fault.times > 0
                return fault
        return None

    def _come(self, action: str, stage: Stage) -> None:
        with self._lock:
            due = [moment for moment in self.moments if (moment.action, moment.stage) == (action, stage)][:1]
            for moment in due:
                self.moments.remove(moment)
        for moment in due:
            moment.do()

    # -- instances ----------------------------------------------------------------------------------------------------

    def _instances(self) -> list[Any]:
        return list(ec2_backends[DEFAULT_ACCOUNT_ID][REGION].all_instances())

    def _act(self, form: Mapping[str, str], living: set[str]) -> None:
        """Make true what a call that moto took has promised."""
        action = form["Action"]
        now = {found.id: found for found in self._instances() if found.state != "terminated"}
        self.most_live = max(self.most_live, len(now))
        if action == "RunInstances":
            for name in now.keys() - living:
                found = now[name]
                user_data = base64.b64decode(form.get("UserData", ""))
                self._hypervisor.boot(name, found.public_ip, found.private_ip, user_data)
        elif action == "TerminateInstances":
            self._end(sorted(living - now.keys()))
        elif "SecurityGroup" in action and not action.startswith("Describe"):
            groups = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].describe_security_groups()
            self._hypervisor.allow(
                [
                    (rule.ip_range["CidrIp"], int(rule.from_port))
                    for group in groups
                    for rule in group.ingress_rules
                    if rule.ip_protocol == "tcp" and rule.from_port is not None and "CidrIp" in rule.ip_range
                ]
            )

    def _end(self, instances: Iterable[str]) -> None:
        for instance in instances:
            if instance in self._ended:
                continue
            self._ended[instance] = time.monotonic()
            ec2_backends[DEFAULT_ACCOUNT_ID][REGION].terminate_instances([instance])
            self._hypervisor.terminate(instance)

    def _vanish(self) -> None:
        """A terminated instance is listed for an hour, then nothing remembers it."""
        reservations = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].reservations
        for name, reservation in list(reservations.items()):
            over = [self._ended.get(found.id) for found in reservation.instances]
            if all(ended is not None and time.monotonic() > ended + self.vanish_s for ended in over):
                del reservations[name]

    # -- prices -------------------------------------------------------------------------------------------------------

    def _spot_history(self, form: Mapping[str, str]) -> str:
        wanted = {value for name, value in form.items() if name.startswith("InstanceType.")}
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        items = "".join(
            f"<item><instanceType>{kind}</instanceType><productDescription>Linux/UNIX</productDescription>"
            f"<spotPrice>{price}</spotPrice><timestamp>{now}</timestamp><availabilityZone>{zone}</availabilityZone></item>"
            for (kind, zone), price in self.spot.items()
            if kind in wanted
        )
        return (
            f'<DescribeSpotPriceHistoryResponse xmlns="{NAMESPACE}"><requestId>r</requestId>'
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken/></DescribeSpotPriceHistoryResponse>"
        )

    def _products(self, request: Mapping[str, Any]) -> str:
        kind = next(f["Value"] for f in request["Filters"] if f["Field"] == "instanceType")
        price = self.on_demand.get(kind)
        terms = {
            "OnDemand": {"A.B": {"priceDimensions": {"A.B.C": {"unit": "Hrs", "pricePerUnit": {"USD": str(price)}}}}}
        }
        return json.dumps({"FormatVersion": "aws_v1", "PriceList": [json.dumps({"terms": terms})] if price else []})


class _Answer:
    """The body of an answer; `told` is called once the server has sent it, or could not."""

    def __init__(self, content: Iterable[bytes], told: Callable[[], None]) -> None:
        self._content = content
        self._told = told

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._content)

    def close(self) -> None:
        """Called by the server (PEP 3333)."""
        self._told()


def default_group() -> str:
    """The security group that every account has from the beginning."""
    (found,) = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].describe_security_groups(filters={"group-name": ["default"]})
    return str(found.id)


def listen_in(namespace: str, host: str) -> socket.socket:
    """A listening socket in a network namespace, or, where that is empty, in ours; any thread may accept from it."""
    made: list[socket.socket] = []

    def listen() -> None:
        if namespace:
            descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "cannot enter the network namespace", namespace)
            finally:
                os.close(descriptor)
        made.append(socket.create_server((host, 0), backlog=64))

    thread = threading.Thread(target=listen)  # only this thread changes its namespace
    thread.start()
    thread.join()
    if not made:
        raise OSError(f"cannot listen on {host} in {namespace or 'this namespace'}")
    return made[0]


def _reply(start: StartResponse, text: str, kind: str = "application/x-amz-json-1.1", status: int = 200) -> list[bytes]:
    content = text.encode()
    start(f"{status} said", [("Content-Type", kind), ("Content-Length", str(len(content)))])
    return [content]


def _refuse(start: StartResponse, code: str, message: str, status: int = 400) -> list[bytes]:
    error = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
    return _reply(start, f"<Response><Errors>{error}</Errors><RequestID>r</RequestID></Response>", "text/xml", status)
