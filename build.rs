//! Compiles the C++ part (`src/libtorch/*.cpp`) against the libtorch that tch found, and tells cargo how the
//! result is linked and run.

#[path = "build/libtorch.rs"]
mod libtorch;
#[path = "build/link.rs"]
mod link;
#[path = "build/nccl.rs"]
mod nccl;

use std::env;

use libtorch::Libtorch;
use nccl::Nccl;

/// Each is a cxx bridge `src/libtorch/NAME.rs` beside its `NAME.cpp` and `NAME.h`.
const BRIDGES: &[&str] =
    &["c10d", "facts", "function", "generator", "hooks", "list", "store", "streams", "tensor"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    // Documentation needs no libtorch: rustdoc neither links nor reads the C++ part.
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() || env::var_os("DOCS_RS").is_some() {
        return;
    }
    if let Err(reason) = build() {
        for line in reason.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let libtorch = Libtorch::that_tch_found()?;
    libtorch.check_version()?;
    libtorch.check_files()?;
    libtorch.check_symbols()?;
    let nccl = Nccl::find(&libtorch)?;
    compile(&libtorch, nccl.as_ref())?;
    link::emit(&libtorch)?;
    if let Some(nccl) = nccl {
        nccl.link();
    }
    Ok(())
}

fn compile(libtorch: &Libtorch, nccl: Option<&Nccl>) -> Result<(), String> {
    let rust: Vec<_> = BRIDGES.iter().map(|name| format!("src/libtorch/{name}.rs")).collect();
    let mut build = cxx_build::bridges(&rust);
    for name in BRIDGES {
        build.file(format!("src/libtorch/{name}.cpp"));
    }
    build.file("src/libtorch/c10d/gloo.cpp").include("src/libtorch/c10d/headers");
    match nccl {
        Some(nccl) => {
            build.file("src/libtorch/c10d/nccl.cpp");
            nccl.compile(&mut build);
        }
        None => {
            build.file("src/libtorch/c10d/no_nccl.cpp");
        }
    }
    println!("cargo::rerun-if-changed=src/libtorch");
    build
        .includes(libtorch.include_folders())
        .std("c++17")
        .opt_level(1)
        .define("AT_PER_OPERATOR_HEADERS", None)
        .define("_GLIBCXX_USE_CXX11_ABI", libtorch.cxx11_abi().as_str())
        .flag_if_supported("-w")
        .try_compile("tchd")
        .map_err(|error| {
            format!(
                "the C++ part of tch-distributed did not compile against {}\n\
                 {error}\n\
                 It needs a C++17 compiler (gcc 12 is tested) and the headers of libtorch {}.\n\
                 `cargo xtask setup` in the repository of tch-distributed provides those headers; a libtorch of \
                 your own is named by LIBTORCH.",
                libtorch.lib.display(),
                libtorch::TESTED.join(" or "),
            )
        })
}
