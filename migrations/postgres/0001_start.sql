CREATE TABLE files (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes BIGINT NOT NULL,
    sha256 TEXT NOT NULL, status TEXT NOT NULL, status_details TEXT, created_at BIGINT NOT NULL
);
CREATE INDEX files_by_project ON files (project, created_at, id);

CREATE TABLE jobs (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, created_at BIGINT NOT NULL, started_at BIGINT, finished_at BIGINT,
    status TEXT NOT NULL, requested TEXT, model TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT,
    spec TEXT NOT NULL, priority BIGINT NOT NULL, output_model TEXT NOT NULL, fine_tuned_model TEXT,
    trained_tokens BIGINT, result_files TEXT NOT NULL, error TEXT, metadata TEXT, estimated_finish BIGINT,
    -- the attempt's number, who works on it and until when, and whether it got anywhere
    fence BIGINT NOT NULL, worker TEXT, lease_until BIGINT, barren_attempts BIGINT NOT NULL, next_seq BIGINT NOT NULL
);
CREATE INDEX jobs_by_project ON jobs (project, created_at, id);
CREATE INDEX jobs_by_status ON jobs (status, priority, created_at);

CREATE TABLE events (
    id TEXT PRIMARY KEY, job_id TEXT NOT NULL REFERENCES jobs (id), seq BIGINT NOT NULL, created_at BIGINT NOT NULL,
    level TEXT NOT NULL, message TEXT NOT NULL, kind TEXT NOT NULL, data TEXT, step BIGINT,
    UNIQUE (job_id, seq)
);

CREATE TABLE checkpoints (
    id TEXT PRIMARY KEY, job_id TEXT NOT NULL REFERENCES jobs (id), created_at BIGINT NOT NULL, fence BIGINT NOT NULL,
    step BIGINT NOT NULL, model TEXT NOT NULL, files TEXT NOT NULL, metrics TEXT NOT NULL,
    UNIQUE (job_id, step)
);

CREATE TABLE adapters (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, model TEXT NOT NULL, parent TEXT NOT NULL, method TEXT NOT NULL,
    generation TEXT NOT NULL, bytes BIGINT NOT NULL, created_at BIGINT NOT NULL, job_id TEXT, step BIGINT,
    UNIQUE (project, model)
);

CREATE TABLE keys (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL,
    created_at BIGINT NOT NULL, revoked_at BIGINT
);

CREATE TABLE reports (
    file_id TEXT NOT NULL, model TEXT NOT NULL, max_seq_len BIGINT NOT NULL, report TEXT NOT NULL,
    PRIMARY KEY (file_id, model, max_seq_len)
);

CREATE TABLE audit (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at BIGINT NOT NULL, project TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL
);
