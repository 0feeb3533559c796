-- Names of the user's own for adapters, moved by compare-and-swap.
CREATE TABLE aliases (
    project TEXT NOT NULL, name TEXT NOT NULL, adapter_id TEXT NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    generation TEXT NOT NULL, updated_at BIGINT NOT NULL,
    PRIMARY KEY (project, name)
);
CREATE INDEX aliases_by_adapter ON aliases (adapter_id);
