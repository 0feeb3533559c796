-- Files that come in parts, and the parts that have come.
CREATE TABLE uploads (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes BIGINT NOT NULL,
    status TEXT NOT NULL, created_at BIGINT NOT NULL, expires_at BIGINT NOT NULL, file_id TEXT
);
CREATE INDEX uploads_by_time ON uploads (status, expires_at);

CREATE TABLE upload_parts (
    id TEXT PRIMARY KEY, upload_id TEXT NOT NULL REFERENCES uploads (id) ON DELETE CASCADE, bytes BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX parts_by_upload ON upload_parts (upload_id);
