use std::io::Write;

use super::*;

const LIMIT: u64 = 1 << 20;

fn file(name: &str, data: &[u8]) -> (String, Vec<u8>) {
    (name.into(), data.to_vec())
}

fn adapter(prefix: &str) -> Vec<(String, Vec<u8>)> {
    vec![
        file(&format!("{prefix}README.md"), b"hello"),
        file(&format!("{prefix}{WEIGHTS}"), &[7; 3000]),
        file(&format!("{prefix}{CONFIG}"), b"{\"r\": 8}"),
    ]
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// The three containers of the same files.
fn containers(files: &[(String, Vec<u8>)]) -> [Vec<u8>; 3] {
    let tar = write_tar(files).unwrap();
    [write_zip(files).unwrap(), gzip(&tar), tar]
}

fn refusal(bytes: &[u8], limit: u64) -> String {
    read_adapter(bytes, limit).unwrap_err().to_string()
}

/// A tar whose one entry has this path as it stands: the builder itself would refuse most of them.
fn raw_tar(path: &[u8], kind: tar::EntryType, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(data.len() as u64);
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, data).unwrap();
    tar.into_inner().unwrap()
}

#[test]
fn the_two_files_come_out_of_every_container() {
    for prefix in ["", "my-adapter/"] {
        for bytes in containers(&adapter(prefix)) {
            let files = read_adapter(&bytes, LIMIT).unwrap();
            assert_eq!(files, [file(CONFIG, b"{\"r\": 8}"), file(WEIGHTS, &[7; 3000])]);
        }
    }
    let dotted = raw_tar(b"./adapter_config.json", tar::EntryType::Regular, b"{}");
    assert!(refusal(&dotted, LIMIT).contains("no adapter_model.safetensors"), "the config was found");
}

/// Adapters directly below the one at the top come behind it, by their directories.
#[test]
fn adapters_below_come_with_the_one_above() {
    for prefix in ["", "mix/"] {
        let parts = [adapter(prefix), adapter(&format!("{prefix}1/")), adapter(&format!("{prefix}0/"))];
        let deeper = adapter(&format!("{prefix}0/old/"));
        for bytes in containers(&[parts.concat(), deeper].concat()) {
            let files = read_adapter(&bytes, LIMIT).unwrap();
            let paths: Vec<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
            let expected = ["", "0/", "1/"].map(|folder| [CONFIG, WEIGHTS].map(|name| format!("{folder}{name}")));
            assert_eq!(paths, expected.concat());
        }
        let half = [adapter(prefix), vec![file(&format!("{prefix}0/{CONFIG}"), b"{}")]].concat();
        let message = refusal(&write_zip(&half).unwrap(), LIMIT);
        assert_eq!(message, format!("the archive has no {prefix}0/adapter_model.safetensors"));
    }
}

#[test]
fn the_same_files_give_the_same_bytes() {
    let [zip, _, tar] = containers(&adapter(""));
    let [again_zip, _, again_tar] = containers(&adapter(""));
    assert_eq!((zip, tar), (again_zip, again_tar));
}

#[test]
fn paths_that_leave_the_archive_are_refused() {
    for path in ["../adapter_config.json", "/etc/passwd", "a/../../b", "..\\evil", "C:/evil"] {
        let message = refusal(&raw_tar(path.as_bytes(), tar::EntryType::Regular, b"x"), LIMIT);
        assert!(message.contains("leads out of the archive"), "{path}: {message}");
        let message = refusal(&write_zip(&[file(path, b"x")]).unwrap(), LIMIT);
        assert!(message.contains("leads out of the archive"), "{path}: {message}");
    }
    let message = refusal(&raw_tar(b"\xff.json", tar::EntryType::Regular, b"x"), LIMIT);
    assert_eq!(message, "the path \"\\xff.json\" is not UTF-8");
}

#[test]
fn links_are_refused() {
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Fifo] {
        let message = refusal(&raw_tar(CONFIG.as_bytes(), kind, b""), LIMIT);
        assert!(message.contains("adapter_config.json\" is a link"), "{message}");
    }
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.add_symlink(CONFIG, "/etc/passwd", zip::write::SimpleFileOptions::default()).unwrap();
    let message = refusal(&zip.finish().unwrap().into_inner(), LIMIT);
    assert_eq!(message, "\"adapter_config.json\" is a link; an adapter holds plain files");
}

#[test]
fn what_is_missing_double_or_apart_is_named() {
    let config = file(CONFIG, b"{}");
    for bytes in containers(std::slice::from_ref(&config)) {
        let message = refusal(&bytes, LIMIT);
        assert_eq!(message, "the archive has no adapter_model.safetensors at its top or in one directory below it");
    }
    for bytes in containers(&[file("a/b/adapter_config.json", b"{}"), file(WEIGHTS, b"w")]) {
        assert!(refusal(&bytes, LIMIT).starts_with("the archive has no adapter_config.json"), "two directories deep");
    }
    for bytes in containers(&[file("a/adapter_config.json", b"{}"), file("b/adapter_config.json", b"{}")]) {
        let message = refusal(&bytes, LIMIT);
        assert_eq!(
            message,
            "the archive holds adapter_config.json twice: a/adapter_config.json and b/adapter_config.json"
        );
    }
    let same = write_tar(&[config.clone(), config.clone()]).unwrap();
    assert!(refusal(&same, LIMIT).contains("holds adapter_config.json twice"));
    for bytes in containers(&[config, file("b/adapter_model.safetensors", b"w")]) {
        assert!(refusal(&bytes, LIMIT).ends_with("lie in different directories"));
    }
}

#[test]
fn a_zip_with_two_entries_of_one_name_is_refused() {
    let mut zip = write_zip(&[file("adapter_config.jsom", b"{}"), file(CONFIG, b"{}")]).unwrap();
    while let Some(at) = zip.windows(4).position(|w| w == b"jsom") {
        zip[at..at + 4].copy_from_slice(b"json");
    }
    assert_eq!(refusal(&zip, LIMIT), "the zip archive has two entries of one name");
}

#[test]
fn a_pickle_alone_is_refused_for_what_it_is() {
    let pickle = file(PICKLE, b"\x80\x02}");
    for bytes in containers(&[file(CONFIG, b"{}"), pickle.clone()]) {
        let error = read_adapter(&bytes, LIMIT).unwrap_err();
        assert!(
            matches!(&error, FormatError::Pickle(what) if what.starts_with("adapter_model.bin is a pickle")),
            "{error}"
        );
    }
    for bytes in containers(&[file(CONFIG, b"{}"), pickle, file(WEIGHTS, b"w")]) {
        assert!(read_adapter(&bytes, LIMIT).is_ok(), "beside safetensors it is one of the other files");
    }
}

#[test]
fn bytes_are_counted_while_they_are_unpacked() {
    let files = adapter("");
    let size = 3000 + 8;
    for bytes in [write_zip(&files).unwrap(), write_tar(&files).unwrap()] {
        assert!(read_adapter(&bytes, size).is_ok());
        assert_eq!(refusal(&bytes, size - 1), "the archive unpacks to more than 3007 bytes");
    }
    let bomb = gzip(&vec![0; 50 << 20]);
    assert!(bomb.len() < 1 << 17);
    assert_eq!(refusal(&bomb, LIMIT), "the archive unpacks to more than 1048576 bytes");
}

#[test]
fn damage_is_an_error() {
    assert_eq!(refusal(b"hello", LIMIT), "the archive is neither a zip nor a tar nor a gzipped tar");
    for bytes in containers(&adapter("")) {
        // The last kilobyte of a tar is padding.
        for keep in (4..bytes.len().saturating_sub(1100)).step_by(97).chain([bytes.len() / 2]) {
            assert!(read_adapter(&bytes[..keep], LIMIT).is_err(), "{keep} of {}", bytes.len());
        }
    }
    let tar = write_tar(&adapter("")).unwrap();
    assert_eq!(refusal(&tar[..2100], LIMIT), "the tar archive ends within \"adapter_model.safetensors\"");
}
