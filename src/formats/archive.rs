//! Adapter directories as zip or tar: read with limits, written reproducibly.
