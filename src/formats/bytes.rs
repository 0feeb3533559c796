//! Where a container's bytes live.

use std::{fs::File, path::Path};

use bytes::Bytes;
use memmap2::Mmap;

use super::FormatError;

/// A whole file, mapped. Parts of it can be kept by whoever needs them.
pub(super) fn map(path: &Path) -> Result<Bytes, FormatError> {
    let io = |source| FormatError::Io { path: path.display().to_string(), source };
    let file = File::open(path).map_err(io)?;
    // An empty file cannot be mapped on every system; the parsers say what is wrong with it.
    if file.metadata().map_err(io)?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is only read. Model files are put in place by rename and never written again;
    // whoever truncates one under a running server is its operator.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}
