"""The four providers' APIs, simulated over real HTTP: for the demo, the tests and anyone integrating.

    simulator = Simulator()                         serve `simulator.app` with uvicorn; then, as the
    simulator.base_urls("http://127.0.0.1:9000")    `base_url` of an account of each provider, use these

A job ends by itself: it is submitted, waits for 15 % of its duration, runs, and has completed or failed when
the duration is over. What a caller wants to happen instead it says at submit, in the request header
`X-Simulator`, as JSON with the fields of `Plan`; the provider's own request body stays as documented.

    GET    /_simulator/jobs         every job, oldest first
    GET    /_simulator/requests     what was asked of the providers, and the status answered
    POST   /_simulator/troubles     makes the next status requests go wrong: the fields of `Trouble`
    DELETE /_simulator/troubles     no more troubles
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import random
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, ValidationInfo, field_validator
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from relay import __version__

log = logging.getLogger(__name__)

Json = dict[str, Any]
Phase = Literal["queued", "processing", "completed", "failed"]
Provider = Literal["pixellabs", "vivix", "pictory", "luma"]
TroubleKind = Literal[
    "rate_limited",  # 429 with Retry-After
    "server_error",  # 500, or `status`
    "html",  # 200 with an HTML error page
    "truncated",  # 200 with JSON cut in the middle
    "dropped",  # the connection is closed before any byte of a response
    "unknown_status",  # the answer with a status word that nobody documented, or `status`
    "not_found_in_body",  # Pictory only: HTTP 200, and JOB_NOT_FOUND in the body
    "cloudflare",  # 403 with an HTML page, error 1010: bot protection, not a bad key
    "wrong_type",  # the answer, declared to be text/plain
    "empty",  # 200 without a body
]

QUEUED_FOR = 0.15  # of a job's duration
LATE = 5.0  # seconds from a job's end to its "late" callback
EARLY = 2.0  # seconds for which a job with an "early" callback still says that it runs
DRIFT = 0.05  # seconds added to a callback's waiting: sleep and `now` are two clocks, and callers ask at once
KEPT = 100_000  # jobs, and recorded requests; the oldest go first
MAX_BODY = 1 << 20

VIVIX_WEBHOOK_KEY = "vvx_webhook_simulator"

HeaderText = Annotated[str, Field(pattern=r"^[ -~]{1,100}$")]


class Plan(BaseModel, extra="forbid", frozen=True):
    """What is to happen to one job. Everything may be left out."""

    outcome: Literal["completed", "failed"] = "completed"
    duration: float | None = Field(default=None, ge=0, le=30 * 86400, allow_inf_nan=False)  # seconds
    code: str | None = None  # the provider's own failure code
    message: str | None = None
    outputs: int | None = Field(default=None, ge=0, le=100)  # PixelLabs and Pictory give one, or none for 0
    owner: str | None = None  # another account, to which the job belongs
    status: str | None = None  # what to answer as the status while the job runs
    callback: Literal["once", "twice", "never", "late", "early"] = "once"  # see LATE and EARLY
    webhook: str | None = Field(default=None, pattern=r"^https?://")  # of Vivix: its account's
    webhook_secret: HeaderText = VIVIX_WEBHOOK_KEY  # with which Vivix signs that callback
    job_id: str | None = Field(default=None, pattern=r"^[\w-]{1,100}$")  # replaces a job that has this id


class Trouble(BaseModel, extra="forbid"):
    """What is to go wrong with the next `count` status requests of one provider, or of one of its jobs."""

    provider: Provider
    kind: TroubleKind
    count: int = Field(default=1, ge=1, le=1_000_000)
    job_id: str | None = None
    retry_after: NonNegativeInt | HeaderText | None = None  # seconds or an HTTP date
    status: int | str | None = None

    @field_validator("kind")
    @classmethod
    def _kind_fits_provider(cls, kind: str, info: ValidationInfo) -> str:
        if kind == "not_found_in_body" and info.data.get("provider") != "pictory":
            raise ValueError("only pictory answers like this")
        return kind

    @field_validator("status")
    @classmethod
    def _status_fits_kind(cls, status: int | str | None, info: ValidationInfo) -> int | str | None:
        if info.data.get("kind") == "server_error" and status not in (None, *range(500, 600)):
            raise ValueError("must be an HTTP status from 500 to 599")
        return status


@dataclass(frozen=True, slots=True)
class Job:
    """One simulated job. It never changes: what it says of itself follows from the time."""

    provider: str
    id: str
    plan: Plan
    request: Mapping[str, Any]  # the body it was submitted with
    submitted_at: float
    duration: float
    callbacks: list[int | None] = field(default_factory=list)  # the status answered to each; None: no answer

    @property
    def ends_at(self) -> float:
        """When the job has ended; its status requests learn of it at `admits_end_at`."""
        return self.submitted_at + self.duration

    @property
    def admits_end_at(self) -> float:
        """The time from which a status request answers completed or failed."""
        return self.ends_at + (EARLY if self.plan.callback == "early" else 0)

    def phase(self, now: float) -> Phase:
        """Where the job is, as a status request would be told."""
        if now >= self.admits_end_at:
            return self.plan.outcome
        return "queued" if now < self.submitted_at + QUEUED_FOR * self.duration else "processing"

    def outputs(self, asked: object = 1) -> range:
        """The numbers of the job's outputs: as planned, else as many as its request asked for."""
        if self.plan.outputs is not None:
            return range(self.plan.outputs)
        return range(asked if isinstance(asked, int) and 0 < asked <= 100 else 1)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request that a provider was asked; the credential is not kept."""

    provider: str
    method: str
    path: str
    job_id: str | None
    time: float
    status: int | None  # None: the connection was dropped


def pixellabs_answer(job: Job, phase: Phase, now: float) -> Json:
    """What PixelLabs answers when asked for a job."""
    ran = (now - job.submitted_at) / job.duration if job.duration else 1.0
    progress = {"queued": 0, "completed": 100}.get(phase, min(99, int(100 * ran)))
    defaults = {"prompt": "a lighthouse", "style": "digital_art", "aspectRatio": "1:1", "quality": "high"}
    metadata: Json = {name: job.request.get(name, default) for name, default in defaults.items()}
    metadata |= {"seed": zlib.crc32(job.id.encode()), "model": "synthetix-v2.1"}
    answer: Json = {"generationId": job.id, "status": phase, "progress": progress, "metadata": metadata}
    answer["createdAt"] = iso(job.submitted_at)
    if phase == "completed":
        image, arweave = f"https://cdn.pixellabsai.app/images/{job.id}.png", digest(job.id)[:43]
        answer["imageUrl"] = image if job.outputs() else None
        answer["arweaveUrl"] = f"https://arweave.net/{arweave}" if job.outputs() else None
        answer["completedAt"] = iso(job.ends_at)
    if phase == "failed":  # no field is documented for this: only what the caller planned
        answer |= {"error": job.plan.code} if job.plan.code else {}
        answer |= {"message": job.plan.message} if job.plan.message else {}
    return answer


def vivix_answer(job: Job, phase: Phase, now: float) -> Json:
    """What Vivix answers when asked for a job."""
    status = "pending" if phase == "queued" else phase
    answer: Json = {"generation_id": job.id, "status": status, "created_at": iso(job.submitted_at)}
    if phase == "failed":
        message = job.plan.message or "Underlying model returned an error."
        answer |= {"error": job.plan.code or "PROVIDER_ERROR", "message": message, "credits_used": 0}
        return answer | {"completed_at": iso(job.ends_at)}
    answer["model"] = vivix_model(job)
    if phase != "completed":
        elapsed = round(1000 * (now - job.submitted_at))
        return answer | {"credits_estimate": VIVIX_CREDITS, "elapsed_ms": elapsed}
    names = [f"{job.id}-{n}" if n else job.id for n in job.outputs(job.request.get("number_results"))]
    urls = [f"https://pub-364da8d08c644542b169fbc7255349e7.r2.dev/{name}.jpg" for name in names]
    answer |= {"output_url": urls[0] if urls else None, "output_urls": urls, "credits_used": VIVIX_CREDITS}
    return answer | {"duration_ms": round(1000 * job.duration), "completed_at": iso(job.ends_at)}


def vivix_callback(job: Job) -> tuple[bytes, dict[str, str]]:
    """What Vivix sends to the webhook of an account, and its headers: not the names that its answers have."""
    answer, failed = vivix_answer(job, job.plan.outcome, job.ends_at), job.plan.outcome == "failed"
    content: Json = {"generation_id": job.id, "status": job.plan.outcome, "model": vivix_model(job)}
    content |= {"output_url": answer.get("output_url"), "output_urls": answer.get("output_urls")}
    content |= {"credits_charged": answer["credits_used"], "duration_ms": round(1000 * job.duration)}
    content |= {"completed_at": iso(job.ends_at, "milliseconds")}
    content |= {"error_code": answer["error"], "error_message": answer["message"]} if failed else {}
    body = json.dumps(content).encode()
    signature = hmac.digest(job.plan.webhook_secret.encode(), body, "sha256").hex()
    return body, {
        "User-Agent": "Vivix-Webhook/1.0",
        "X-Vivix-Signature": f"sha256={signature}",
        "X-Vivix-Event": f"generation.{job.plan.outcome}",
        "X-Vivix-Delivery-Id": str(uuid.uuid4()),
    }


def vivix_model(job: Job) -> Any:
    return job.request.get("model", "grok-imagine-image-quality")


def pictory_answer(job: Job, phase: Phase, now: float) -> Json:
    """What Pictory answers when asked for a job, and sends to its webhook."""
    data: Json = {"status": phase if phase in ("completed", "failed") else "in-progress"}
    if phase == "completed":
        data["url"] = f"https://pictory-static.pictorycontent.com/{job.id}.png" if job.outputs() else None
        credits = PICTORY_CREDITS.get(str(job.request.get("model")), 2)
        data |= {"width": 1024, "height": 1024, "aiCreditsUsed": credits}
    if phase == "failed":
        data["error_code"] = job.plan.code or "IMAGE_GENERATION_FAILED"
        data["error_message"] = job.plan.message or "The image could not be generated."
    return {"job_id": job.id, "success": phase != "failed", "data": data}


def pictory_callback(job: Job) -> tuple[bytes, dict[str, str]]:
    """What Pictory sends to the webhook of a job, and its headers."""
    body = json.dumps(pictory_answer(job, job.plan.outcome, job.ends_at)).encode()
    return body, {"User-Agent": f"Pictory-Webhook-Simulator/{__version__}"}


def luma_answer(job: Job, phase: Phase, now: float) -> Json:
    """What Luma Agents answers when asked for a job."""
    kind, model = job.request.get("type", "image"), job.request.get("model", "uni-1")
    answer = {"id": job.id, "created_at": iso(job.submitted_at), "model": model, "state": phase, "type": kind}
    if phase == "completed":  # with URLs that are signed anew for each answer, and valid for an hour from it
        media, ending = ("video", "mp4") if str(kind).startswith("video") else ("image", "png")
        given = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
        query = f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date={given}&X-Amz-Expires=3600"
        base, signature = "https://luma-agents.s3.amazonaws.com", digest(job.id + given)
        urls = [f"{base}/{job.id}/{n}.{ending}?{query}&X-Amz-Signature={signature}" for n in job.outputs()]
        answer["output"] = [{"type": media, "url": url} for url in urls]
    if phase == "failed":
        answer["failure_code"] = job.plan.code or "generation_failed"
        answer["failure_reason"] = job.plan.message or "The generation failed."
    return answer


@dataclass(frozen=True, slots=True)
class Api:
    """How one provider's API looks from outside."""

    name: Provider
    base: str
    submit_path: str
    status_path: str
    answer: Callable[[Job, Phase, float], Json]
    key: str
    scheme: str = "Bearer "
    created: int = 200
    not_yours: int = 404  # answered for a job of another account


PIXELLABS = Api(
    "pixellabs", "/pixellabs/v1", "/generate", "/generate/{id}", pixellabs_answer, "pixel_live_simulator"
)  # fmt: skip
VIVIX = Api(
    "vivix", "/vivix/api/v1", "/generate", "/generations/{id}", vivix_answer, "vvx_live_simulator",
    not_yours=403,
)  # fmt: skip
PICTORY = Api(
    "pictory", "/pictory/pictoryapis/v1", "/aistudio/images", "/jobs/{id}", pictory_answer,
    "pictai_simulator", scheme="",
)  # fmt: skip
LUMA = Api(
    "luma", "/luma/v1", "/generations", "/generations/{id}", luma_answer, "luma_simulator", created=201
)  # fmt: skip
APIS: Mapping[str, Api] = {api.name: api for api in (PIXELLABS, VIVIX, PICTORY, LUMA)}

VIVIX_CREDITS = 211
PICTORY_CREDITS = {"seedream3.0": 2, "flux-schnell": 0.6, "nanobanana": 4, "nanobanana-pro": 14}
ERRORS = {  # HTTP status: the code at PixelLabs, the code at Vivix, the message
    400: ("validation_error", "INVALID_REQUEST", "The body must be a JSON object; its webhook, a URL."),
    401: ("invalid_token", "KEY_INVALID", "The API key is missing or not valid."),
    403: ("insufficient_permissions", "NOT_YOURS", "This generation belongs to a different account."),
    404: ("not_found", "NOT_FOUND", "No generation with that id exists."),
    429: ("rate_limit_exceeded", "RATE_LIMITED", "Too many requests."),
    500: ("internal_error", "INTERNAL_ERROR", "Something went wrong on our side."),
}


def accepted(api: Api, job: Job) -> Json:
    """The answer to a submit."""
    match api.name:
        case "pixellabs":
            times = {"estimatedTime": max(1, round(job.duration)), "createdAt": iso(job.submitted_at)}
            return {"generationId": job.id, "status": "queued", **times}
        case "vivix":
            return {"generation_id": job.id, "status": "pending", "credits_estimate": VIVIX_CREDITS}
        case "pictory":
            return {"success": True, "data": {"jobId": job.id}}
        case "luma":
            return luma_answer(job, "queued", job.submitted_at)


def refused(api: Api, status: int, job_id: str | None = None) -> Json:
    """The body of an error, in its provider's shape."""
    pixellabs_code, vivix_code, message = ERRORS[status]
    match api.name:
        case "pixellabs":
            return {"error": pixellabs_code, "message": message, "details": {}}
        case "vivix":
            return {"error": vivix_code, "message": message}
        case "luma":
            return {"detail": message}
    if status == 404:
        unknown = {"error_code": "5000", "error_message": "JOB_NOT_FOUND"}
        return {"job_id": job_id, "success": False, "data": unknown}
    if status == 400:
        fields = [{"name": "webhook", "errors": "must be a valid URI"}]
        return {"code": "INVALID_REQUEST_BODY", "message": message, "fields": fields}
    return {"message": "Unauthorized" if status == 401 else message}


def with_status(body: Json, word: str) -> Json:
    """The answer, saying `word` where it says its status; what says none stays as it is."""
    if isinstance(data := body.get("data"), dict):
        return body | {"data": with_status(data, word)}
    return body | {name: word for name in ("status", "state") if name in body}


def iso(moment: float, precision: str = "seconds") -> str:
    """RFC 3339, in whole seconds unless told otherwise, as the providers write it."""
    return datetime.fromtimestamp(moment, UTC).replace(tzinfo=None).isoformat(timespec=precision) + "Z"


def digest(text: str) -> str:
    """A stable stand-in for what a provider would have made at random."""
    return hashlib.sha256(text.encode()).hexdigest()


class Dropped(Response):
    """No response at all: the connection is closed before its first byte."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # ASGI has no word for this, and returning without a response makes uvicorn answer 500. But its
        # `receive` is a method of what holds the connection, and comes here unwrapped (`send` does not).
        transport = getattr(getattr(receive, "__self__", None), "transport", None)
        if transport is None:
            raise ConnectionResetError("dropped by the simulator")
        transport.abort()
        while (await receive())["type"] != "http.disconnect":
            pass  # until uvicorn has noticed, it would complain of the missing response


def troubled(trouble: Trouble, api: Api, status: int, body: Json) -> Response:
    """What is answered instead of `body`."""
    raw = json.dumps(body).encode()
    wait = {} if trouble.retry_after is None else {"Retry-After": str(trouble.retry_after)}
    match trouble.kind:
        case "rate_limited":
            return JSONResponse(refused(api, 429), 429, {"Retry-After": "5"} | wait)
        case "server_error":
            return JSONResponse(refused(api, 500), int(trouble.status or 500), wait)
        case "html":
            return HTMLResponse("<!DOCTYPE html><title>502 Bad Gateway</title><h1>Bad Gateway</h1>")
        case "truncated":
            return Response(raw[: len(raw) // 2], media_type="application/json")
        case "dropped":
            return Dropped()
        case "unknown_status":
            return JSONResponse(with_status(body, str(trouble.status or "hibernating")), status)
        case "not_found_in_body":
            return JSONResponse(refused(api, 404, body.get("job_id")), 200)
        case "cloudflare":
            return HTMLResponse("<!DOCTYPE html><title>Access denied</title>error code: 1010", 403)
        case "wrong_type":
            return Response(raw, status, media_type="text/plain")
        case "empty":
            return Response()


class Simulator:
    """The four APIs and their jobs. Serve `app`; ask for jobs and troubles by HTTP, or by these methods.

    The same `seed` gives the same job ids and durations; these are log-normal around `median` seconds. `now`
    is asked for the time (unix seconds) and decides what a job says; `sleep` is awaited before a callback.
    `keys` replaces accepted API keys, by provider. `rate_limit` is how many requests a minute PixelLabs and
    Vivix say they allow; it is counted, not enforced: for a 429, ask for a trouble.

    `requests` holds what the providers were asked, oldest first; `jobs` the jobs by provider and id; `keys`
    the API key that each provider accepts. A Simulator is served once: callbacks end with the app's lifespan.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        median: float = 12.0,
        sigma: float = 0.4,
        keys: Mapping[str, str] | None = None,
        rate_limit: int = 1000,
    ) -> None:
        self.jobs: dict[tuple[str, str], Job] = {}
        self.requests: list[Recorded] = []
        self.keys = {name: api.key for name, api in APIS.items()} | dict(keys or {})
        self._random = random.Random(seed)  # noqa: S311 (nothing here is a secret)
        self._now, self._sleep = now, sleep
        self._median, self._sigma = median, sigma
        self._rate_limit = rate_limit
        self._minute: dict[str, tuple[int, int]] = {}  # provider → this minute, requests in it
        self._troubles: list[Trouble] = []
        self._callbacks: set[asyncio.Task[None]] = set()
        self._client = httpx.AsyncClient(trust_env=False, timeout=10)
        self.app = Starlette(
            routes=self._routes(), lifespan=self._lifespan, exception_handlers={ValidationError: invalid}
        )

    @staticmethod
    def base_urls(origin: str) -> dict[str, str]:
        """The `base_url` of each provider when the simulator is served at `origin` (`http://host:port`)."""
        return {name: origin.rstrip("/") + api.base for name, api in APIS.items()}

    def submit(self, provider: str, *, request: Mapping[str, Any] | None = None, **plan: Any) -> str:
        """Start a job and give its id. `plan` are the fields of `Plan`; `request` is the provider's own body.

        Raises ValueError for a plan that does not fit. A Pictory job whose request has a `webhook`, and a
        Vivix job whose plan has one, needs a running event loop.
        """
        if provider not in APIS:
            raise ValueError(f"unknown provider {provider!r}")
        return self._start(APIS[provider], Plan.model_validate(plan), request or {}).id

    def trouble(self, provider: str, kind: str, **options: Any) -> None:
        """Make the next status requests of a provider go wrong; `options` are further fields of `Trouble`.

        They are used up in the order in which they were asked for. Raises ValueError for one that cannot be.
        """
        self._troubles.append(Trouble.model_validate({"provider": provider, "kind": kind, **options}))

    def _start(self, api: Api, plan: Plan, request: Mapping[str, Any]) -> Job:
        duration = self._random.lognormvariate(math.log(self._median), self._sigma)
        bits = self._random.getrandbits(128)
        made = f"gen_{bits >> 80:012x}" if api is PIXELLABS else str(uuid.UUID(int=bits, version=4))
        duration = duration if plan.duration is None else plan.duration
        job = Job(api.name, plan.job_id or made, plan, request, self._now(), duration)
        self.jobs[api.name, job.id] = job
        if len(self.jobs) > KEPT:
            del self.jobs[next(iter(self.jobs))]
        webhook = {"pictory": request.get("webhook"), "vivix": plan.webhook}.get(api.name)
        if webhook and plan.callback != "never":
            task = asyncio.create_task(self._call_back(job, webhook))
            self._callbacks.add(task)
            task.add_done_callback(self._callbacks.discard)
        return job

    async def _call_back(self, job: Job, url: str) -> None:
        await self._sleep(job.duration + DRIFT + (LATE if job.plan.callback == "late" else 0))
        made = vivix_callback if job.provider == "vivix" else pictory_callback
        for _ in range(2 if job.plan.callback == "twice" else 1):
            body, headers = made(job)
            headers |= {"Content-Type": "application/json"}
            try:
                status = (await self._client.post(url, content=body, headers=headers)).status_code
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                status = None
                log.warning("the callback of job %s failed: %r", job.id, error)
            job.callbacks.append(status)

    def _routes(self) -> list[Route]:
        limit = [Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)]
        routes = [
            Route("/_simulator/jobs", self._list_jobs),
            Route("/_simulator/requests", self._list_requests),
            Route("/_simulator/troubles", self._add_trouble, methods=["POST"], middleware=limit),
            Route("/_simulator/troubles", self._clear_troubles, methods=["DELETE"]),
        ]
        for api in APIS.values():
            submit, status = partial(self._submit, api), partial(self._status, api)
            routes.append(Route(api.base + api.submit_path, submit, methods=["POST"], middleware=limit))
            routes.append(Route(api.base + api.status_path, status, methods=["GET"]))
        return routes

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        for task in self._callbacks:
            task.cancel()
        await asyncio.gather(*self._callbacks, return_exceptions=True)
        await self._client.aclose()

    def _is_authorized(self, api: Api, request: Request) -> bool:
        return request.headers.get("authorization") == api.scheme + self.keys[api.name]

    async def _submit(self, api: Api, request: Request) -> Response:
        if not self._is_authorized(api, request):
            return self._finish(api, request, None, JSONResponse(refused(api, 401), 401))
        body = parsed(await request.body())
        calls_back = api is PICTORY and body is not None and "webhook" in body
        if body is None or (calls_back and not str(body["webhook"]).startswith(("https://", "http://"))):
            return self._finish(api, request, None, JSONResponse(refused(api, 400), 400))
        job = self._start(api, Plan.model_validate_json(request.headers.get("x-simulator", "{}")), body)
        return self._finish(api, request, job.id, JSONResponse(accepted(api, job), api.created))

    async def _status(self, api: Api, request: Request) -> Response:
        job_id = request.path_params["id"]
        status, body = self._look_up(api, request, job_id)
        response: Response = JSONResponse(body, status)
        for trouble in self._troubles:
            if trouble.provider == api.name and trouble.job_id in (None, job_id):
                response = troubled(trouble, api, status, body)
                trouble.count -= 1
                self._troubles = [trouble for trouble in self._troubles if trouble.count]
                break
        return self._finish(api, request, job_id, response)

    def _look_up(self, api: Api, request: Request, job_id: str) -> tuple[int, Json]:
        job, now = self.jobs.get((api.name, job_id)), self._now()
        refusal = 0 if self._is_authorized(api, request) else 401
        refusal = refusal or (404 if job is None else api.not_yours if job.plan.owner else 0)
        if refusal or job is None:
            return refusal, refused(api, refusal, job_id)
        body = api.answer(job, job.phase(now), now)
        if job.plan.status and now < job.admits_end_at:
            body = with_status(body, job.plan.status)
        return 200, body

    def _finish(self, api: Api, request: Request, job_id: str | None, response: Response) -> Response:
        """Record the request and give its response the headers that the provider documents."""
        now = self._now()
        status = None if isinstance(response, Dropped) else response.status_code
        self.requests.append(Recorded(api.name, request.method, request.url.path, job_id, now, status))
        del self.requests[:-KEPT]
        minute = int(now // 60)
        counted, used = self._minute.get(api.name, (minute, 0))
        used = used + 1 if counted == minute else 1
        self._minute[api.name] = (minute, used)
        remaining = str(max(0, self._rate_limit - used))
        request_id = request.headers.get("x-request-id") or f"req_{uuid.uuid4().hex[:12]}"
        if api is PIXELLABS:
            limits = {"X-RateLimit-Limit": str(self._rate_limit), "X-RateLimit-Reset": str(60 * minute + 60)}
            response.headers.update(limits | {"X-RateLimit-Remaining": remaining})
        elif api is VIVIX and response.status_code < 400:
            response.headers.update({"X-RateLimit-Remaining": remaining, "X-Credits-Balance": "10000"})
            response.headers["X-Request-Id"] = request_id
        elif api is LUMA:
            response.headers.update({"X-Request-Id": request_id, "X-API-Version": "2026-04-01"})
        return response

    async def _list_jobs(self, request: Request) -> Response:
        now = self._now()
        rows = [
            {"provider": job.provider, "job_id": job.id, "phase": job.phase(now), "callbacks": job.callbacks}
            | {"submitted_at": job.submitted_at, "ends_at": job.ends_at}
            for job in self.jobs.values()
        ]
        return JSONResponse(rows)

    async def _list_requests(self, request: Request) -> Response:
        return JSONResponse([asdict(recorded) for recorded in self.requests])

    async def _add_trouble(self, request: Request) -> Response:
        trouble = Trouble.model_validate_json(await request.body())
        self._troubles.append(trouble)
        return JSONResponse(trouble.model_dump(exclude_none=True), 201)

    async def _clear_troubles(self, request: Request) -> Response:
        self._troubles.clear()
        return Response(status_code=204)


def parsed(body: bytes) -> Json | None:
    """The JSON object in a request's body, or None if it holds none."""
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


async def invalid(request: Request, error: Exception) -> Response:
    """422, naming each field of a trouble or of the X-Simulator header that cannot be used."""
    details = error.errors() if isinstance(error, ValidationError) else []
    whole = "X-Simulator" if "x-simulator" in request.headers else "body"
    errors = [{"field": str([*detail["loc"], whole][0]), "message": detail["msg"]} for detail in details]
    return JSONResponse({"errors": errors}, 422)
