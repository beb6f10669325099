//! What the build script says about a libtorch that is not whole or not a tested one.

// The build script's own module; the search through torch-sys's variables is not called here.
#[allow(dead_code, clippy::duplicate_mod)]
#[path = "../build/libtorch.rs"]
mod libtorch;

use std::fs;
use std::path::Path;

use libtorch::{Libtorch, TESTED};

fn libtorch_in(folder: &Path) -> Libtorch {
    Libtorch { lib: folder.join("lib"), include: folder.join("include") }
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn every_file_that_tells_a_version_is_understood() {
    let header =
        "#define TORCH_VERSION_MAJOR 1\n#define TORCH_VERSION_MINOR 13\n#define TORCH_VERSION_PATCH 2\n";
    for (file, text, version) in [
        ("build-version", "1.9.0+cpu\n", "1.9.0"),
        ("version.py", "__all__ = []\n__version__ = '2.1.0+cu130'\ndebug = False\n", "2.1.0"),
        ("include/torch/headeronly/version.h", header, "1.13.2"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join(file), text);
        let error = libtorch_in(folder.path()).is_tested().unwrap_err();
        assert!(error.starts_with(&format!("libtorch {version} in ")), "{file}: {error}");
    }
}

#[test]
fn an_untested_version_is_refused_with_the_tested_ones_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("build-version"), "2.12.1");
    let error = libtorch_in(folder.path()).is_tested().unwrap_err();
    for said in TESTED.iter().chain(&["TCH_DISTRIBUTED_UNTESTED_LIBTORCH=1", "cargo xtask setup"]) {
        assert!(error.contains(said), "{said} is not in: {error}");
    }
}

#[test]
fn tested_versions_are_accepted_whatever_their_build_tag() {
    for version in TESTED {
        for tag in ["", "+cpu", "+cu130"] {
            let folder = tempfile::tempdir().unwrap();
            write(&folder.path().join("build-version"), &format!("{version}{tag}\n"));
            libtorch_in(folder.path()).is_tested().unwrap();
        }
    }
}

#[test]
fn a_missing_header_or_library_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let libtorch = libtorch_in(folder.path());
    // Whichever is missed first is supplied, until all is there.
    let mut missed = Vec::new();
    while let Err(error) = libtorch.check_files() {
        assert!(error.contains("cargo xtask setup") && error.contains("LIBTORCH="), "{error}");
        let mut words = error.split_whitespace().skip(1);
        let (what, file) = (words.next().unwrap(), words.next().unwrap());
        let place = if what == "header" { &libtorch.include } else { &libtorch.lib };
        write(&place.join(file), "");
        missed.push(file.to_owned());
        assert!(missed.len() < 50, "{missed:?}");
    }
    assert!(
        missed.iter().any(|file| file == "libtorch_cpu.so")
            && missed.iter().any(|file| file.ends_with(".hpp"))
    );
}

#[test]
fn a_library_without_gloo_is_said_and_one_that_only_uses_it_is_one_without() {
    let folder = tempfile::tempdir().unwrap();
    let libtorch = libtorch_in(folder.path());
    fs::create_dir_all(&libtorch.lib).unwrap();
    // This program is linked with libtorch, and defines none of it.
    fs::copy(std::env::current_exe().unwrap(), libtorch.lib.join("libtorch_cpu.so")).unwrap();
    let error = libtorch.check_symbols().unwrap_err();
    assert!(error.contains("without Gloo") && error.contains("cargo xtask setup"), "{error}");
    let this = fs::read(std::env::current_exe().unwrap()).unwrap();
    assert_eq!(libtorch::symbols::defines(&this, b"_no_such_symbol"), Some(false));
    assert_eq!(libtorch::symbols::defines(b"no library", b"_"), None);
}
