-- Answers whose requests asked to keep them, and what was said of them. Gone after the operator's retention.
CREATE TABLE completions (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, model TEXT NOT NULL, fingerprint TEXT NOT NULL,
    created_at BIGINT NOT NULL, messages TEXT NOT NULL, choices TEXT NOT NULL
);
CREATE INDEX completions_by_time ON completions (created_at);

CREATE TABLE feedback (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, completion_id TEXT NOT NULL REFERENCES completions (id) ON DELETE CASCADE,
    choice BIGINT NOT NULL, judgement TEXT NOT NULL, comment TEXT, created_at BIGINT NOT NULL
);
CREATE INDEX feedback_by_project ON feedback (project);
CREATE INDEX feedback_by_completion ON feedback (completion_id);
