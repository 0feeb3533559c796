//! What can be stored, and under which name.

/// What can be stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// An uploaded or produced file's content.
    File { id: String },
    /// A part of a file that is still coming.
    Part { upload: String, id: String },
    /// A named part of a checkpoint, under the attempt that wrote it.
    Checkpoint { job: String, fence: i64, step: u64, name: String },
    /// A file of an adapter; `name` is `manifest.json` or one of the files in it. Generations never change.
    Adapter { generation: String, name: String },
}

impl Key {
    /// Parts are ours or checked names, so that no key leaves its folder.
    pub(super) fn path(&self) -> String {
        match self {
            Key::File { id } => format!("files/{}", safe(id)),
            Key::Part { upload, id } => format!("uploads/{}/{}", safe(upload), safe(id)),
            Key::Checkpoint { job, fence, step, name } => {
                format!("{}{fence}/{step}/{}", Key::checkpoints_of(job), safe(name))
            }
            Key::Adapter { generation, name } => format!("adapters/{}/{}", safe(generation), safe(name)),
        }
    }

    /// The folder of a job's checkpoints, with its last slash.
    pub(super) fn checkpoints_of(job: &str) -> String {
        format!("checkpoints/{}/", safe(job))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.path())
    }
}

/// Letters, digits, `-`, `_` and single dots stay; everything else becomes `_`.
fn safe(part: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    let text: String = part.chars().map(keep).collect();
    if text.chars().all(|c| c == '.') { "_".repeat(text.len().max(1)) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_leaves_its_folder() {
        let key = Key::Adapter { generation: "../../etc".to_owned(), name: "..".to_owned() };
        assert_eq!(key.path(), "adapters/.._.._etc/__");
        let key = Key::Checkpoint { job: "a/b".to_owned(), fence: 2, step: 7, name: "x\0y".to_owned() };
        assert_eq!(key.path(), "checkpoints/a_b/2/7/x_y");
    }
}
