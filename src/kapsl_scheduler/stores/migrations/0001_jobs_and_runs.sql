-- Times are microseconds since 1970 UTC. Definitions and states are JSON, so that they can be asked with json_extract.

-- A job's books change with every firing, its definition hardly ever, and that may hold whole arrays: a row of its own
-- keeps it from being written again each time.
CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL,
    state TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE definitions (
    job TEXT NOT NULL PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    definition TEXT NOT NULL
);

CREATE TABLE memory (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (job, key)
) WITHOUT ROWID;

-- Runs outlive their job. AUTOINCREMENT: the number of a deleted run is never given again.
CREATE TABLE runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    nominal INTEGER NOT NULL,
    origin TEXT NOT NULL,
    state TEXT NOT NULL,
    first INTEGER NOT NULL,
    due INTEGER NOT NULL,
    count INTEGER NOT NULL,
    reason TEXT NOT NULL,
    error TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    started INTEGER,
    ended INTEGER,
    owner TEXT NOT NULL,
    "limit" INTEGER NOT NULL,
    detached INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    failed_requests INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    input_bytes INTEGER NOT NULL,
    output_bytes INTEGER NOT NULL,
    callback_error TEXT NOT NULL,
    UNIQUE (job, nominal, origin)
);

-- Each of these ends in the number by itself, which is the order of pages.
CREATE INDEX runs_by_job ON runs (job);
CREATE INDEX runs_by_state ON runs (state);
CREATE INDEX runs_by_end ON runs (coalesce(ended, due)) WHERE state NOT IN ('pending', 'running');

CREATE TABLE owners (
    owner TEXT NOT NULL PRIMARY KEY,
    beat INTEGER NOT NULL
) WITHOUT ROWID;

-- The version that was given last, to whichever job.
CREATE TABLE versions (
    last INTEGER NOT NULL
);

INSERT INTO versions VALUES (0);
