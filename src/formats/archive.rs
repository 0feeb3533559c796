//! Adapter directories as zip or tar: read with limits, written reproducibly.
//!
//! An archive comes from outside, so its names are checked before its bytes are unpacked, and its bytes are counted while
//! they are unpacked: a header may claim any size. Nothing is written to a disk here.

use std::{
    collections::BTreeMap,
    io::{Cursor, Read},
};

use super::FormatError;

#[cfg(test)]
mod tests;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";

/// The two files of an adapter (`adapter_config.json`, `adapter_model.safetensors`, in this order) out of a zip, a tar or a
/// gzipped tar. They lie at its top or together in one directory. Behind them those of adapters in directories directly
/// below, as `0/adapter_config.json`; every other file is passed over.
pub fn read_adapter(bytes: &[u8], limit: u64) -> Result<Vec<(String, Vec<u8>)>, FormatError> {
    let mut found = Found { left: limit, limit, ..Found::default() };
    match bytes {
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => read_zip(bytes, &mut found)?,
        [0x1f, 0x8b, ..] => {
            let mut unpacked = Found { left: limit, limit, ..Found::default() };
            let tar = unpacked.unpack(flate2::read::MultiGzDecoder::new(bytes), "the gzip stream")?;
            read_tar(&tar, &mut found)?;
        }
        _ if bytes.get(257..262) == Some(b"ustar") => read_tar(bytes, &mut found)?,
        _ => return Err(invalid("the archive is neither a zip nor a tar nor a gzipped tar")),
    }
    found.finish()
}

/// A zip of these files. The same files give the same bytes: no clock, no owner.
pub fn write_zip(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>, FormatError> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in files {
        // Weights do not compress; storing them keeps the export as fast as a copy.
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default())
            .system(zip::System::Unix)
            .unix_permissions(0o644)
            .large_file(u32::try_from(data.len()).is_err());
        zip.start_file(name.as_str(), options).map_err(|e| invalid(format!("{name}: {e}")))?;
        std::io::Write::write_all(&mut zip, data).map_err(|e| invalid(format!("{name}: {e}")))?;
    }
    let done = zip.finish().map_err(|e| invalid(format!("the zip archive cannot be finished: {e}")))?;
    Ok(done.into_inner())
}

/// A tar of these files, under the same promise.
pub fn write_tar(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>, FormatError> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, name, data.as_slice()).map_err(|e| invalid(format!("{name}: {e}")))?;
    }
    tar.into_inner().map_err(|e| invalid(format!("the tar archive cannot be finished: {e}")))
}

fn read_zip(bytes: &[u8], found: &mut Found) -> Result<(), FormatError> {
    let damaged = |e| invalid(format!("the zip archive is damaged: {e}"));
    let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
    // The index keeps one entry a name, so a second one would vanish without a word.
    if zip.has_duplicate_names() {
        return Err(invalid("the zip archive has two entries of one name"));
    }
    for index in 0..zip.len() {
        let entry = zip.by_index(index).map_err(damaged)?;
        let path = entry.name_raw().to_vec();
        let is_file = entry.is_file();
        if entry.is_symlink() {
            return Err(invalid(format!("{} is a link; an adapter holds plain files", shown(&path))));
        }
        found.entry(&path, is_file, entry)?;
    }
    Ok(())
}

fn read_tar(bytes: &[u8], found: &mut Found) -> Result<(), FormatError> {
    let damaged = |e| invalid(format!("the tar archive is damaged: {e}"));
    let mut tar = tar::Archive::new(bytes);
    for entry in tar.entries().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        let path = entry.path_bytes().into_owned();
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        if !kind.is_file() && !kind.is_dir() {
            return Err(invalid(format!("{} is a link or a device; an adapter holds plain files", shown(&path))));
        }
        // The reader ends early at the end of its input and calls that a file.
        if entry.raw_file_position().saturating_add(entry.size()) > bytes.len() as u64 {
            return Err(invalid(format!("the tar archive ends within {}", shown(&path))));
        }
        found.entry(&path, kind.is_file(), entry)?;
    }
    Ok(())
}

/// What the walk over an archive has met so far.
#[derive(Default)]
struct Found {
    limit: u64,
    /// How many bytes may still be unpacked.
    left: u64,
    /// By directory and name.
    kept: BTreeMap<(String, &'static str), Vec<u8>>,
    pickle: Option<String>,
}

impl Found {
    /// Takes note of one entry, and unpacks it when it may be one of the files that are wanted.
    fn entry(&mut self, path: &[u8], is_file: bool, data: impl Read) -> Result<(), FormatError> {
        let path = checked(path)?;
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path.as_str()));
        if !is_file || depth(folder) > 2 {
            return Ok(());
        }
        let Some(name) = [CONFIG, WEIGHTS, PICKLE].into_iter().find(|known| *known == name) else { return Ok(()) };
        if name == PICKLE {
            self.pickle = Some(path);
            return Ok(());
        }
        let place = (folder.to_owned(), name);
        if self.kept.contains_key(&place) {
            return Err(twice(name, &path, &path));
        }
        let bytes = self.unpack(data, &path)?;
        self.kept.insert(place, bytes);
        Ok(())
    }

    /// Reads to the end, and not one byte further than the limit allows.
    fn unpack(&mut self, data: impl Read, what: &str) -> Result<Vec<u8>, FormatError> {
        let mut bytes = Vec::new();
        let read = data.take(self.left.saturating_add(1)).read_to_end(&mut bytes);
        let read = read.map_err(|e| invalid(format!("{what} cannot be unpacked: {e}")))? as u64;
        match self.left.checked_sub(read) {
            Some(left) => self.left = left,
            None => return Err(invalid(format!("the archive unpacks to more than {} bytes", self.limit))),
        }
        Ok(bytes)
    }

    /// The adapter's files at its top, then those of the directories directly below it.
    fn finish(mut self) -> Result<Vec<(String, Vec<u8>)>, FormatError> {
        let configs = || self.kept.keys().filter(|(_, name)| *name == CONFIG).map(|(folder, _)| folder);
        let top = configs().min_by_key(|folder| depth(folder)).filter(|top| depth(top) < 2).cloned();
        let Some(top) = top else {
            self.refuse_pickle()?;
            return Err(missing(CONFIG));
        };
        if let Some(other) = configs().find(|other| **other != top && depth(other) == depth(&top)) {
            return Err(twice(CONFIG, &join(&top, CONFIG), &join(other, CONFIG)));
        }
        if !self.kept.contains_key(&(top.clone(), WEIGHTS)) {
            self.refuse_pickle()?;
            let elsewhere = self.kept.keys().find(|(_, name)| *name == WEIGHTS);
            return Err(elsewhere.map_or_else(
                || missing(WEIGHTS),
                |(folder, name)| {
                    invalid(format!("{} and {} lie in different directories", join(&top, CONFIG), join(folder, name)))
                },
            ));
        }
        let below = |folder: &String| {
            let inner = folder.strip_prefix(&top)?;
            let inner = if top.is_empty() { inner } else { inner.strip_prefix('/')? };
            Some(inner.to_owned()).filter(|inner| !inner.contains('/'))
        };
        let mut folders: Vec<(String, String)> =
            self.kept.keys().filter_map(|(folder, _)| Some((folder.clone(), below(folder)?))).collect();
        folders.dedup();
        let mut files = Vec::new();
        for (folder, inner) in [(top, String::new())].into_iter().chain(folders.into_iter().filter(|f| !f.1.is_empty()))
        {
            for name in [CONFIG, WEIGHTS] {
                let bytes = self.kept.remove(&(folder.clone(), name));
                let bytes = bytes.ok_or_else(|| invalid(format!("the archive has no {}", join(&folder, name))))?;
                files.push((join(&inner, name), bytes));
            }
        }
        Ok(files)
    }

    fn refuse_pickle(&self) -> Result<(), FormatError> {
        match &self.pickle {
            None => Ok(()),
            Some(path) => Err(FormatError::Pickle(format!(
                "{path} is a pickle file, which can run code when it is loaded; save the adapter as {WEIGHTS}"
            ))),
        }
    }
}

/// How many directories deep.
fn depth(folder: &str) -> usize {
    if folder.is_empty() { 0 } else { 1 + folder.matches('/').count() }
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

fn missing(name: &str) -> FormatError {
    invalid(format!("the archive has no {name} at its top or in one directory below it"))
}

fn twice(name: &str, one: &str, other: &str) -> FormatError {
    invalid(format!("the archive holds {name} twice: {one} and {other}"))
}

/// The path in plain form, or why it is refused. An entry that would be passed over is refused too: whoever packs such a
/// path means harm, or has packed something else than an adapter.
fn checked(path: &[u8]) -> Result<String, FormatError> {
    let text = std::str::from_utf8(path).map_err(|_| invalid(format!("the path {} is not UTF-8", shown(path))))?;
    let leaves = text.starts_with('/') || text.contains(['\\', '\0', ':']) || text.split('/').any(|part| part == "..");
    if leaves {
        return Err(invalid(format!("the path {} leads out of the archive", shown(path))));
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    Ok(parts.join("/"))
}

/// A path for a message: its start, with what is not plain text escaped.
fn shown(path: &[u8]) -> String {
    format!("\"{}\"", path[..path.len().min(80)].escape_ascii())
}

fn invalid(what: impl Into<String>) -> FormatError {
    FormatError::Invalid(what.into())
}
