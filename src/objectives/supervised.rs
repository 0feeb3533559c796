//! Next-token cross entropy over the trained tokens.
