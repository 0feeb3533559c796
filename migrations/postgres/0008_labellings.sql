-- Tasks that label pairs of answers, and the rows that are through: a task that starts again goes on behind them.
CREATE TABLE labellings (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, created_at BIGINT NOT NULL, started_at BIGINT, finished_at BIGINT,
    status TEXT NOT NULL, requested TEXT, file TEXT NOT NULL, spec TEXT NOT NULL, base TEXT NOT NULL,
    total BIGINT NOT NULL, report TEXT, result_file TEXT, error TEXT, metadata TEXT,
    fence BIGINT NOT NULL, worker TEXT, lease_until BIGINT, barren_attempts BIGINT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY
);
CREATE INDEX labellings_by_project ON labellings (project, seq);
CREATE INDEX labellings_by_status ON labellings (status);

CREATE TABLE labels (
    task_id TEXT NOT NULL REFERENCES labellings (id) ON DELETE CASCADE, line BIGINT NOT NULL, label TEXT NOT NULL,
    PRIMARY KEY (task_id, line)
);
