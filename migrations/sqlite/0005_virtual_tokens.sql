-- Places of the context that an adapter takes before the text. Adapters of before take none.
ALTER TABLE adapters ADD COLUMN virtual_tokens BIGINT NOT NULL DEFAULT 0;
