-- Adapters that are kept at hand.
CREATE TABLE pins (adapter_id TEXT PRIMARY KEY REFERENCES adapters (id) ON DELETE CASCADE);
