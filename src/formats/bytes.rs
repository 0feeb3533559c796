//! Where a container's bytes live.

use std::{fs::File, ops::Deref, path::Path};

use memmap2::Mmap;

use super::FormatError;

/// A mapped file, or bytes in memory.
pub(super) enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(super) fn map(path: &Path) -> Result<Self, FormatError> {
        let io = |source| FormatError::Io { path: path.display().to_string(), source };
        let file = File::open(path).map_err(io)?;
        // An empty file cannot be mapped on every system; the parsers say what is wrong with it.
        if file.metadata().map_err(io)?.len() == 0 {
            return Ok(Bytes::Owned(Vec::new()));
        }
        // SAFETY: the map is only read. Model files are put in place by rename and never written again;
        // whoever truncates one under a running server is its operator.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Bytes::Map(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}
