//! The dependency arrows and size limits of the sources, checked like any other behaviour.
//! When a wall has to move, move it here and in the design in one commit, and say why.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Each room, and the rooms it may name with `crate::`, lowest room first.
const ROOMS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("formats", &[]),
    ("text", &["domain", "formats"]),
    ("model", &["domain", "formats"]),
    ("data", &["domain", "text"]),
    ("methods", &["domain", "formats", "model"]),
    // An objective says which rows it reads: a pair, a text with a thumb up or down.
    ("objectives", &["domain", "data", "model", "methods"]),
    ("trainer", &["domain", "data", "model", "methods", "objectives"]),
    ("storage", &["domain"]),
    ("db", &["domain"]),
    ("outbound", &["domain"]),
    ("inference", &["domain", "text", "model", "methods", "storage"]),
    (
        "jobs",
        &[
            "domain",
            "formats",
            "text",
            "model",
            "methods",
            "objectives",
            "data",
            "trainer",
            "storage",
            "db",
            "outbound",
            "inference",
        ],
    ),
    (
        "service",
        &[
            "domain",
            "formats",
            "text",
            "model",
            "methods",
            "objectives",
            "data",
            "trainer",
            "storage",
            "db",
            "outbound",
            "inference",
            "jobs",
        ],
    ),
    ("api", &["domain", "service", "jobs", "inference", "storage", "db"]),
    // A client of the running server: it knows the wire, and starts and stops the process.
    ("quickstart", &["outbound", "api"]),
];

/// Outside names that belong to a few rooms (or top-level files) only.
const OWNERS: &[(&str, &[&str])] = &[
    ("candle_core", &["model", "methods", "objectives", "trainer", "inference"]),
    ("aws_sdk_s3", &["storage"]),
    ("sqlx", &["db"]),
    ("axum", &["api", "app", "main"]),
    // The quickstart is a client of our own server on loopback, and of nothing else.
    ("reqwest", &["outbound", "quickstart"]),
    ("env::var", &["config"]),
    ("env::var_os", &["config"]),
    ("env::vars", &["config"]),
];

/// Rooms without async code: a thread stands at their border.
const SYNCHRONOUS: &[&str] = &["domain", "formats", "text", "model", "methods", "objectives", "data", "trainer"];

const MAX_LINES: usize = 500;

#[test]
fn every_room_has_its_row() {
    let mut missing = Vec::new();
    for entry in fs::read_dir(root().join("src")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !ROOMS.iter().any(|(room, _)| *room == name) {
            missing.push(name);
        }
    }
    assert!(missing.is_empty(), "folders of src without a row in the table: {missing:?}");
}

#[test]
fn rooms_use_only_the_rooms_they_may() {
    let mut broken = Vec::new();
    for (room, allowed) in ROOMS {
        for file in rust_files(&root().join("src").join(room)) {
            for used in rooms_named_in(&fs::read_to_string(&file).unwrap()) {
                if used != *room && !allowed.contains(&used.as_str()) {
                    broken.push(format!("{}: `{room}` must not use `{used}`", file.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn outside_crates_stay_with_their_owners() {
    let mut broken = Vec::new();
    for file in rust_files(&root().join("src")) {
        let (room, text) = (room_of(&file), code_of(&fs::read_to_string(&file).unwrap()));
        for (name, owners) in OWNERS {
            if names(&text, name) && !owners.contains(&room.as_str()) {
                broken.push(format!("{} must not use `{name}`", file.display()));
            }
        }
        if SYNCHRONOUS.contains(&room.as_str()) && (names(&text, "tokio") || text.contains("async fn")) {
            broken.push(format!("{} must not be async", file.display()));
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn no_file_outgrows_its_room() {
    let mut long = Vec::new();
    for folder in ["src", "tests", "benches"] {
        for file in rust_files(&root().join(folder)) {
            let lines = fs::read_to_string(&file).unwrap().lines().count();
            if MAX_LINES < lines {
                long.push(format!("{} has {lines} lines", file.display()));
            }
        }
    }
    assert!(long.is_empty(), "split these:\n{}", long.join("\n"));
}

#[test]
fn the_reader_of_arrows_sees_them() {
    let text = "use crate::{db::Db, model::{Base, crate_x}, text};\n// crate::api\nlet x = crate::jobs::run();";
    let seen: Vec<_> = rooms_named_in(text).into_iter().collect();
    assert_eq!(seen, ["db", "jobs", "model", "text"]);
    assert!(names("use sqlx::Row;", "sqlx"));
    assert!(!names("let asqlx = my_sqlx;", "sqlx"));
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The rooms that follow `crate::`, alone or as the heads of a `crate::{..}` group.
fn rooms_named_in(text: &str) -> BTreeSet<String> {
    let mut heads = BTreeSet::new();
    for rest in code_of(text).split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => heads.extend(group_heads(group)),
            None => _ = heads.insert(first_ident(rest)),
        }
    }
    heads.retain(|head| ROOMS.iter().any(|(room, _)| room == head));
    heads
}

/// Whether `name` stands in the text as a word of its own.
fn names(text: &str, name: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + name.len()..]);
        !before.ends_with(is_part) && !after.starts_with(is_part)
    })
}

/// The text without its comment lines.
fn code_of(text: &str) -> String {
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    text.lines().filter(is_code).collect::<Vec<_>>().join("\n")
}

/// `src/db/jobs.rs` is in `db`; `src/config.rs` is in `config`.
fn room_of(file: &Path) -> String {
    let below = file.strip_prefix(root().join("src")).unwrap().components().next().unwrap();
    below.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned()
}

fn group_heads(group: &str) -> Vec<String> {
    let mut heads = vec![first_ident(group)];
    let mut depth = 1;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => heads.push(first_ident(&group[at + 1..])),
            _ => (),
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

fn first_ident(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            files.push(path);
        }
    }
    files
}
