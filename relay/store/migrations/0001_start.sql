-- Times are unix milliseconds, ids are time-ordered text, JSON is text, a flag is a nullable time.
-- Provider credentials, signing secrets and custom headers are sealed: `relay/store/sealed.py` lists them.
-- Rows carry their tenant. It leads the index of every list: however much its neighbours have, a tenant's list is
-- a range of one. In unique constraints it comes last, so that no list is read by those.

-- Where the rows of this database came from: a copy that has not ended has not brought all of them.
CREATE TABLE copies (
    id TEXT PRIMARY KEY,
    source TEXT NOT NULL,
    position TEXT NOT NULL,
    began_at BIGINT NOT NULL,
    ended_at BIGINT
);

CREATE TABLE tenants (
    id TEXT PRIMARY KEY,
    signing_secrets TEXT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    name TEXT,
    scopes TEXT NOT NULL,
    hash TEXT NOT NULL,
    rate_limit DOUBLE PRECISION,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT,
    last_used_at BIGINT
);
CREATE INDEX keys_of_a_tenant ON keys (tenant, id);
CREATE INDEX keys_not_revoked ON keys (tenant, expires_at) WHERE revoked_at IS NULL;

-- Append-only: nothing changes a row, and only retention removes it.
CREATE TABLE audit (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    object TEXT NOT NULL,
    address TEXT,
    details TEXT NOT NULL
);
CREATE INDEX audit_of_a_tenant ON audit (tenant, id);
CREATE INDEX audit_of_an_object ON audit (tenant, object, id);
CREATE INDEX audit_of_an_actor ON audit (tenant, actor, id);
CREATE INDEX audit_of_an_action ON audit (tenant, action, id);

CREATE TABLE endpoints (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    url TEXT NOT NULL,
    description TEXT,
    event_types TEXT NOT NULL,
    accounts TEXT NOT NULL,
    headers TEXT NOT NULL,
    metadata TEXT NOT NULL,
    filter TEXT,
    secrets TEXT NOT NULL,
    rate_limit DOUBLE PRECISION,
    failing_since BIGINT,
    failing_event TEXT,
    disabled_at BIGINT,
    disabled_reason TEXT,
    deleted_at BIGINT,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    CONSTRAINT disabled_endpoints_have_a_reason CHECK ((disabled_at IS NULL) = (disabled_reason IS NULL))
);
CREATE INDEX endpoints_in_use ON endpoints (tenant, id) WHERE deleted_at IS NULL;

CREATE TABLE generations (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    account TEXT NOT NULL,
    provider TEXT NOT NULL,
    job_id TEXT,
    claimed_job_id TEXT,
    status TEXT NOT NULL,
    metadata TEXT NOT NULL,
    callback_url TEXT,
    awaits_callback BIGINT NOT NULL,
    answer TEXT,
    known_at BIGINT,
    late BIGINT NOT NULL,
    learned_by TEXT,
    event_id TEXT,
    created_at BIGINT NOT NULL,
    deadline_at BIGINT NOT NULL,
    due_at BIGINT,
    lease TEXT,
    asked_at BIGINT,
    open_at BIGINT,
    chance DOUBLE PRECISION NOT NULL,
    rate DOUBLE PRECISION NOT NULL,
    outage BIGINT NOT NULL,
    asks BIGINT NOT NULL,
    errors BIGINT NOT NULL,
    missing BIGINT NOT NULL,
    hint_asks BIGINT,
    hints BIGINT NOT NULL,
    last_error TEXT,
    progress_told DOUBLE PRECISION,
    progress_at BIGINT,
    version BIGINT NOT NULL,
    CONSTRAINT generation_status_is_known
        CHECK (status IN ('queued', 'processing', 'completed', 'failed', 'canceled', 'timed_out')),
    CONSTRAINT only_unfinished_generations_are_polled
        CHECK (due_at IS NULL OR status IN ('queued', 'processing', 'timed_out')),
    CONSTRAINT open_generations_are_due
        CHECK (due_at IS NOT NULL OR status NOT IN ('queued', 'processing')),
    CONSTRAINT ended_generations_are_known_since
        CHECK ((known_at IS NULL) = (status IN ('queued', 'processing'))),
    CONSTRAINT a_job_is_watched_once UNIQUE (job_id, account, tenant)
);
CREATE INDEX generations_due ON generations (account, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX generations_overdue ON generations (account, deadline_at) WHERE known_at IS NULL;
CREATE INDEX generations_ended ON generations (account, known_at) WHERE known_at IS NOT NULL;
CREATE INDEX generations_of_a_tenant ON generations (tenant, id);
CREATE INDEX generations_by_status ON generations (tenant, status, id);
CREATE INDEX generations_of_an_account ON generations (tenant, account, id);

CREATE TABLE relays (
    id TEXT PRIMARY KEY,
    seen_at BIGINT NOT NULL
);

CREATE TABLE shards (
    number BIGINT PRIMARY KEY,
    holder TEXT,
    held_until BIGINT NOT NULL
);
INSERT INTO shards (number, held_until)
WITH RECURSIVE numbers(number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM numbers WHERE number < 63)
SELECT number, 0 FROM numbers;

CREATE TABLE accounts (
    name TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    lent BIGINT NOT NULL,
    wanted BIGINT NOT NULL,
    heard TEXT,
    holder TEXT,
    updated_at BIGINT NOT NULL
);

-- What tenants have added; accounts of the configuration are not here.
CREATE TABLE credentials (
    name TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    provider TEXT NOT NULL,
    base_url TEXT,
    settings TEXT NOT NULL,
    api_key TEXT NOT NULL,
    webhook_secrets TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
);

CREATE TABLE events (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    type TEXT NOT NULL,
    generation_id TEXT,
    account TEXT,
    announces TEXT,
    source_id TEXT,
    body BYTEA NOT NULL,
    expires_at BIGINT,
    created_at BIGINT NOT NULL,
    CONSTRAINT each_status_is_announced_once UNIQUE (generation_id, announces),
    CONSTRAINT a_publisher_names_an_event_once UNIQUE (source_id, tenant)
);
CREATE INDEX events_of_a_tenant ON events (tenant, id);

-- What its publishers have said of a type; one that is not here may be published all the same.
CREATE TABLE event_types (
    tenant TEXT NOT NULL,
    type TEXT NOT NULL,
    description TEXT,
    schema TEXT,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (tenant, type)
);

CREATE TABLE deliveries (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    event_id TEXT NOT NULL REFERENCES events (id),
    endpoint_id TEXT,
    callback_url TEXT,
    destination TEXT NOT NULL,
    status TEXT NOT NULL,
    attempts BIGINT NOT NULL,
    run_attempts BIGINT NOT NULL,
    next_trigger TEXT NOT NULL,
    due_at BIGINT,
    lease TEXT,
    -- What made it pending since it was announced: a replay, or itself where it alone was replayed.
    replay_id TEXT,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    CONSTRAINT delivery_status_is_known
        CHECK (status IN ('pending', 'sending', 'delivered', 'failed', 'canceled')),
    CONSTRAINT deliveries_have_one_destination CHECK ((endpoint_id IS NULL) <> (callback_url IS NULL)),
    CONSTRAINT open_deliveries_are_due CHECK ((status IN ('pending', 'sending')) = (due_at IS NOT NULL)),
    CONSTRAINT sending_deliveries_are_leased CHECK (status <> 'sending' OR lease IS NOT NULL),
    CONSTRAINT an_event_goes_to_an_endpoint_once UNIQUE (event_id, endpoint_id)
);
CREATE INDEX deliveries_due ON deliveries (destination, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX deliveries_of_a_tenant ON deliveries (tenant, id);
CREATE INDEX deliveries_of_an_endpoint ON deliveries (tenant, endpoint_id, id);
CREATE INDEX deliveries_not_delivered ON deliveries (tenant, status, id) WHERE status <> 'delivered';
-- What arrives is never in it.
CREATE INDEX deliveries_failed ON deliveries (id) WHERE status IN ('failed', 'canceled');

CREATE TABLE replays (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    wanted TEXT NOT NULL,
    since BIGINT,
    until BIGINT NOT NULL,
    endpoint_id TEXT,
    generation_id TEXT,
    account TEXT,
    event_type TEXT,
    rate_limit DOUBLE PRECISION NOT NULL,
    status TEXT NOT NULL,
    total BIGINT NOT NULL,
    done BIGINT NOT NULL,
    position TEXT NOT NULL,
    paced_at BIGINT NOT NULL,
    error TEXT,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    ended_at BIGINT,
    CONSTRAINT replay_status_is_known
        CHECK (status IN ('pending', 'running', 'completed', 'canceled', 'failed')),
    CONSTRAINT only_open_replays_have_not_ended CHECK ((status IN ('pending', 'running')) = (ended_at IS NULL)),
    CONSTRAINT failed_replays_have_a_reason CHECK ((status = 'failed') = (error IS NOT NULL))
);
CREATE INDEX replays_of_a_tenant ON replays (tenant, id);
CREATE UNIQUE INDEX an_endpoint_has_one_open_replay ON replays (COALESCE(endpoint_id, ''), tenant)
    WHERE ended_at IS NULL;

CREATE TABLE attempts (
    id TEXT PRIMARY KEY,
    delivery_id TEXT NOT NULL REFERENCES deliveries (id),
    number BIGINT NOT NULL,
    started_at BIGINT NOT NULL,
    duration_ms BIGINT NOT NULL,
    reason TEXT NOT NULL,
    response_status BIGINT,
    response_body TEXT,
    error_code TEXT,
    error_message TEXT,
    CONSTRAINT attempts_are_numbered UNIQUE (delivery_id, number)
);

CREATE TABLE idempotency_keys (
    tenant TEXT NOT NULL,
    key TEXT NOT NULL,
    request_hash TEXT NOT NULL,
    resource_id TEXT NOT NULL,
    status BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (tenant, key)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
