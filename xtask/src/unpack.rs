//! Checksums of wheels, and taking parts out of them. A wheel is a zip archive.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use crate::pip::progress;

/// The file's SHA-256 in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..length]);
    }
}

/// Writes the files of the wheel that `keep` accepts to the same paths under `target`.
pub(crate) fn unpack(wheel: &Path, target: &Path, keep: fn(&str) -> bool) -> Result<()> {
    let mut archive = ZipArchive::new(io::BufReader::new(File::open(wheel)?))
        .with_context(|| format!("{} is no zip archive", wheel.display()))?;
    let (mut kept, mut bytes) = (Vec::new(), 0);
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index)?;
        if !entry.is_dir() && keep(&entry.name()?) {
            kept.push(index);
            bytes += entry.size();
        }
    }
    if kept.is_empty() {
        bail!("{} holds nothing of what was looked for in it", wheel.display());
    }
    let name = wheel.file_name().unwrap_or_default().to_string_lossy();
    let bar = progress(&format!("unpacking {}", name.split('-').next().unwrap_or_default()), bytes);
    for index in kept {
        let mut entry = archive.by_index(index)?;
        let Some(inside) = entry.enclosed_name() else {
            bail!("{} holds a path that leads outside: {:?}", wheel.display(), entry.name()?);
        };
        let path = target.join(inside);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create(&path)?;
        io::copy(&mut bar.wrap_read(&mut entry), &mut file)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    bar.finish_and_clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn archive(folder: &Path) -> std::path::PathBuf {
        let path = folder.join("a.whl");
        let mut writer = ZipWriter::new(File::create(&path).unwrap());
        for name in ["torch/lib/a.so", "torch/b.py"] {
            writer.start_file(name, SimpleFileOptions::default()).unwrap();
            writer.write_all(name.as_bytes()).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn unpacking_keeps_what_is_asked_for_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = archive(folder.path());
        unpack(&wheel, &folder.path().join("out"), |path| path.ends_with(".so")).unwrap();
        assert_eq!(fs::read(folder.path().join("out/torch/lib/a.so")).unwrap(), b"torch/lib/a.so");
        assert!(!folder.path().join("out/torch/b.py").exists());
    }

    #[test]
    fn a_wheel_without_the_wanted_files_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = archive(folder.path());
        let error = unpack(&wheel, folder.path(), |_| false).unwrap_err();
        assert!(error.to_string().contains("nothing"), "{error}");
    }

    #[test]
    fn the_digest_is_that_of_the_standard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, "abc").unwrap();
        // FIPS 180-2, appendix B.1
        assert_eq!(
            sha256(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
