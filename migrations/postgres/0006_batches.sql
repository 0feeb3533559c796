-- Many requests as one file, and what became of each until the files of results are written.
CREATE TABLE batches (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, endpoint TEXT NOT NULL, input_file TEXT NOT NULL,
    completion_window TEXT NOT NULL, status TEXT NOT NULL, errors TEXT NOT NULL, model TEXT, metadata TEXT,
    output_file TEXT, error_file TEXT, total BIGINT NOT NULL, completed BIGINT NOT NULL, failed BIGINT NOT NULL,
    input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, created_at BIGINT NOT NULL, expires_at BIGINT NOT NULL,
    in_progress_at BIGINT, finalizing_at BIGINT, completed_at BIGINT, failed_at BIGINT, expired_at BIGINT,
    cancelling_at BIGINT, cancelled_at BIGINT,
    -- the attempt's number, until when it holds the batch, and how many attempts in a row got nowhere
    fence BIGINT NOT NULL, lease_until BIGINT, barren_attempts BIGINT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY
);
CREATE INDEX batches_by_project ON batches (project, seq);
CREATE INDEX batches_by_status ON batches (status, seq);
CREATE INDEX batches_by_file ON batches (input_file);

CREATE TABLE batch_lines (
    batch_id TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE, line BIGINT NOT NULL, is_ok BIGINT NOT NULL,
    output TEXT NOT NULL,
    PRIMARY KEY (batch_id, line)
);
