-- Pages follow the order of creation, which SQLite has in rowid: the end of every index.
DROP INDEX files_by_project;
CREATE INDEX files_by_project ON files (project);
DROP INDEX jobs_by_project;
CREATE INDEX jobs_by_project ON jobs (project);
DROP INDEX jobs_by_status;
CREATE INDEX jobs_by_status ON jobs (status, priority);
CREATE INDEX adapters_by_generation ON adapters (generation);
CREATE INDEX events_by_step ON events (job_id, step);

-- A worker claims only what it has the base for; faults count the passing ones in a row.
ALTER TABLE jobs ADD COLUMN base TEXT NOT NULL DEFAULT '';
UPDATE jobs SET base = json_extract(spec, '$.base');
ALTER TABLE jobs ADD COLUMN faults BIGINT NOT NULL DEFAULT 0;

-- Who made a change: a key, a worker or the operator.
ALTER TABLE audit ADD COLUMN actor TEXT NOT NULL DEFAULT '';

-- What was made under an Idempotency-Key, written in the transaction that made it.
CREATE TABLE answers (
    project TEXT NOT NULL, key TEXT NOT NULL, request TEXT NOT NULL, answer TEXT NOT NULL, created_at BIGINT NOT NULL,
    PRIMARY KEY (project, key)
);
CREATE INDEX answers_by_time ON answers (created_at);
