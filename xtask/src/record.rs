//! `.cargo/libtorch.toml`, where cargo learns which libtorch to use. `.cargo/config.toml` includes it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::locate::Libtorch;

/// Relative to the repository, and ignored by git.
pub(crate) const FILE: &str = ".cargo/libtorch.toml";

/// Stands in the record where the libtorch is one that we provided.
pub(crate) const PROVIDED: &str = "# provided by `cargo xtask setup`";

const HEAD: &str = "\
# Written by `cargo xtask setup`, which looks for libtorch again when this file is gone.
# Variables that you set yourself win over these.
";

/// The lines that tell cargo where libtorch is; a dependent's `.cargo/config.toml` needs the same.
pub(crate) fn text(libtorch: &Libtorch, nvidia: Option<&Path>) -> String {
    let mut text = match libtorch {
        Libtorch::Users(folder) => format!("[env]\n{}", line("LIBTORCH", folder)),
        Libtorch::Python => "[env]\nLIBTORCH_USE_PYTORCH = \"1\"\n".into(),
        Libtorch::System => "# libtorch is in /usr/lib, where tch looks by itself.\n[env]\n".into(),
        Libtorch::Provisioned(folder) => format!("[env]\n{PROVIDED}\n{}", line("LIBTORCH", folder)),
    };
    if let Some(folder) = nvidia {
        text += &line("TCH_DISTRIBUTED_NVIDIA", folder);
    }
    text
}

fn line(name: &str, value: &Path) -> String {
    let value = value.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
    format!("{name} = \"{value}\"\n")
}

/// Writes it where it is not so already. A reader sees the old file or the new one, never a part.
pub(crate) fn write(root: &Path, lines: &str) -> Result<()> {
    let (path, text) = (root.join(FILE), format!("{HEAD}{lines}"));
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let new = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The `LIBTORCH` of the record.
pub(crate) fn read(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(root.join(FILE)).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("LIBTORCH = \""))?.strip_suffix('"')?;
    Some(PathBuf::from(value.replace("\\\"", "\"").replace("\\\\", "\\")))
}

/// Whether a file holds such lines and nothing else: then nothing of a user's is lost with it.
pub(crate) fn is_ours(text: &str) -> bool {
    let ours = |line: &str| {
        line.is_empty()
            || line == "[env]"
            || line == PROVIDED
            || ["LIBTORCH = ", "TCH_DISTRIBUTED_NVIDIA = "].iter().any(|key| line.starts_with(key))
    };
    text.contains(PROVIDED) && text.lines().all(ours)
}

/// Whether the record's libtorch is one that we provided, and not one that the user named when it was written.
pub(crate) fn is_provided(root: &Path) -> bool {
    fs::read_to_string(root.join(FILE)).is_ok_and(|text| text.contains(PROVIDED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_without_lines_of_the_users_is_ours() {
        let provided = text(&Libtorch::Provisioned("/cache".into()), None);
        assert!(is_ours(&provided));
        assert!(!is_ours(&format!("{provided}\n[build]\njobs = 1\n")));
        assert!(!is_ours(&text(&Libtorch::Users("/opt/libtorch".into()), None)));
    }

    #[test]
    fn what_is_recorded_is_read_back() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(".cargo")).unwrap();
        for folder in ["/opt/libtorch", "/odd \"name\"/back\\slash"] {
            write(root.path(), &text(&Libtorch::Users(folder.into()), Some(Path::new("/n")))).unwrap();
            assert_eq!(read(root.path()), Some(PathBuf::from(folder)));
        }
        write(root.path(), &text(&Libtorch::System, None)).unwrap();
        assert_eq!(read(root.path()), None);
    }
}
