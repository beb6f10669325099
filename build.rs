//! Compiles the C++ part (`src/libtorch/*.cpp`) against the libtorch that tch found.

use std::env;
use std::path::PathBuf;

/// Each is a cxx bridge `src/libtorch/NAME.rs` beside its `NAME.cpp` and `NAME.h`.
const BRIDGES: &[&str] = &["facts", "store", "tensor"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() || env::var_os("DOCS_RS").is_some() {
        return;
    }
    let lib = PathBuf::from(env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is"));
    let include = lib.parent().expect("a lib folder has a parent").join("include");

    let rust: Vec<_> = BRIDGES.iter().map(|name| format!("src/libtorch/{name}.rs")).collect();
    let mut build = cxx_build::bridges(&rust);
    for name in BRIDGES {
        build.file(format!("src/libtorch/{name}.cpp"));
    }
    build
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .std("c++17")
        .opt_level(1)
        .define("AT_PER_OPERATOR_HEADERS", None)
        .flag_if_supported("-w")
        .compile("tchd");
    println!("cargo:rerun-if-changed=src/libtorch");

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
    for name in ["torch_cpu", "torch", "c10"] {
        println!("cargo:rustc-link-lib=dylib={name}");
    }
    println!("cargo:libtorch_lib={}", lib.display());
}
