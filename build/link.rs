//! How the result is linked with libtorch, and how it is found when the program runs.
//!
//! Three ways, because each reaches what the others do not:
//! * an rpath in this package's own programs, tests, examples and benches;
//! * for everything that `cargo run`, `test` and `bench` start, dependents' programs and doc-tests too: cargo puts
//!   link folders inside the target folder on the library path, so we name libtorch's folder through a link there;
//! * the metadata `libtorch_lib`, from which a dependent's build script makes an rpath of its own.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::libtorch::Libtorch;

pub(crate) fn emit(libtorch: &Libtorch) -> Result<(), String> {
    let lib = libtorch.lib.display();
    let link =
        PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR for build scripts")?).join("libtorch");
    point(&link, &libtorch.lib)
        .map_err(|error| format!("cannot link {} to {lib}: {error}", link.display()))?;

    println!("cargo::rustc-link-search=native={}", link.display());
    println!("cargo::rustc-link-search=native={lib}");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // Nothing calls libtorch.so itself, but on a CUDA build it is what loads the CUDA part.
    println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
    for name in ["torch_cpu", "torch", "c10"] {
        println!("cargo::rustc-link-lib=dylib={name}");
    }
    println!("cargo::metadata=libtorch_lib={lib}");
    Ok(())
}

fn point(link: &Path, target: &Path) -> io::Result<()> {
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => symlink(target, link),
    }
}
