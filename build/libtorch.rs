//! The libtorch that torch-sys found: where its files are, which version it is, and whether all is there.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "symbols.rs"]
pub(crate) mod symbols;

/// The versions that the tests have run against.
pub(crate) const TESTED: &[&str] = &["2.11.0", "2.12.0", "2.13.0"];

/// Set to accept a version outside [`TESTED`].
const ACCEPT_UNTESTED: &str = "TCH_DISTRIBUTED_UNTESTED_LIBTORCH";

/// One header of each part of libtorch that the C++ code includes.
const HEADERS: &[&str] = &[
    "ATen/core/Tensor.h",
    "c10/core/Allocator.h",
    "torch/csrc/autograd/engine.h",
    "torch/csrc/autograd/custom_function.h",
    "torch/csrc/distributed/c10d/Backend.hpp",
    "torch/csrc/distributed/c10d/TCPStore.hpp",
];

/// How the names of the constructors of c10d::ProcessGroupGloo begin.
const GLOO: &[u8] = b"_ZN4c10d16ProcessGroupGlooC";

const LIBRARIES: &[&str] = &["libc10.so", "libtorch.so", "libtorch_cpu.so"];

pub(crate) struct Libtorch {
    /// The folder of `libtorch_cpu.so`.
    pub(crate) lib: PathBuf,
    /// The folder of `ATen/` and `torch/`.
    pub(crate) include: PathBuf,
}

impl Libtorch {
    /// torch-sys did the search (`LIBTORCH`, `LIBTORCH_USE_PYTORCH`, the system, a download) and passes the result on.
    pub(crate) fn that_tch_found() -> Result<Self, String> {
        for variable in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI", ACCEPT_UNTESTED] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let lib = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from).ok_or(
            "torch-sys does not say where libtorch is (no DEP_TCH_LIBTORCH_LIB).\n\
             tch-distributed is for Linux; there torch-sys 0.24 to 0.26 says it, unless its feature doc-only is on.",
        )?;
        if env::var_os("CARGO_FEATURE_DOWNLOAD_LIBTORCH").is_some()
            && let Some(named) = env::var_os("LIBTORCH")
        {
            // tch prefers the variable, and cargo's configuration may have set it.
            println!(
                "cargo::warning=the feature download-libtorch downloads nothing: LIBTORCH is {} (if you did not set it, \
                 .cargo/libtorch.toml did: remove that file)",
                Path::new(&named).display()
            );
        }
        let root = match env::var_os("LIBTORCH_INCLUDE") {
            Some(root) => PathBuf::from(root),
            None => lib.parent().map(Path::to_path_buf).unwrap_or_default(),
        };
        Ok(Self { lib, include: root.join("include") })
    }

    pub(crate) fn include_folders(&self) -> [PathBuf; 2] {
        [self.include.clone(), self.include.join("torch/csrc/api/include")]
    }

    /// As torch-sys compiles its own part.
    pub(crate) fn cxx11_abi(&self) -> String {
        env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into())
    }

    pub(crate) fn check_files(&self) -> Result<(), String> {
        for header in HEADERS {
            if !self.include.join(header).is_file() {
                return Err(self.missing("header", header, &self.include));
            }
        }
        for library in LIBRARIES {
            if !self.lib.join(library).is_file() {
                return Err(self.missing("library", library, &self.lib));
            }
        }
        Ok(())
    }

    /// The engine Gloo is in libtorch's library, unless that was built without it.
    pub(crate) fn check_symbols(&self) -> Result<(), String> {
        let library = self.lib.join("libtorch_cpu.so");
        let bytes = fs::read(&library).map_err(|error| format!("{}: {error}", library.display()))?;
        match symbols::defines(&bytes, GLOO) {
            Some(true) => Ok(()),
            Some(false) => Err(format!(
                "{} was built without Gloo (USE_GLOO, USE_DISTRIBUTED): it does not define c10d::ProcessGroupGloo, which \
                 the backend gloo of tch-distributed is made of.\n\
                 `cargo xtask setup` in the repository of tch-distributed provides a libtorch that has it.",
                library.display()
            )),
            // The linker will say more of it.
            None => Ok(()),
        }
    }

    fn missing(&self, what: &str, file: &str, folder: &Path) -> String {
        format!(
            "libtorch's {what} {file} is not in {}\n\
             What to do, one of:\n\
             - `cargo xtask setup` in the repository of tch-distributed, which provides a whole libtorch;\n\
             - LIBTORCH=<folder that holds lib/ and include/>, or LIBTORCH_LIB and LIBTORCH_INCLUDE where they lie \
             apart;\n\
             - LIBTORCH_USE_PYTORCH=1 where `import torch` works in Python;\n\
             - the feature download-libtorch.",
            folder.display()
        )
    }

    pub(crate) fn check_version(&self) -> Result<(), String> {
        if env::var(ACCEPT_UNTESTED).is_ok_and(|value| value != "0") {
            return Ok(());
        }
        self.is_tested()
    }

    pub(crate) fn is_tested(&self) -> Result<(), String> {
        let Some(version) = self.version() else {
            println!(
                "cargo::warning=the version of the libtorch in {} cannot be told; tested are {}",
                self.lib.display(),
                TESTED.join(", ")
            );
            return Ok(());
        };
        if TESTED.contains(&version.as_str()) {
            return Ok(());
        }
        Err(format!(
            "libtorch {version} in {} is not a version that tch-distributed has been tested with.\n\
             Tested versions: {}. (tch 0.26 wants 2.13.0, tch 0.24 wants 2.11.0; none was published for 2.12.0, \
             and both take it where LIBTORCH_BYPASS_VERSION_CHECK=1 is set.)\n\
             `cargo xtask setup` in the repository of tch-distributed provides the right one.\n\
             To build with this one all the same, set {ACCEPT_UNTESTED}=1.",
            self.lib.display(),
            TESTED.join(", "),
        ))
    }

    /// `2.13.0`, from whichever of its files says so.
    fn version(&self) -> Option<String> {
        let root = self.lib.parent()?;
        for file in ["build-version", "version.py"] {
            let path = root.join(file);
            let Ok(text) = fs::read_to_string(&path) else { continue };
            println!("cargo::rerun-if-changed={}", path.display());
            let value =
                text.lines().find_map(|line| line.strip_prefix("__version__ = ")).unwrap_or(text.trim());
            if let Some(version) = plain(value.trim_matches(['\'', '"'])) {
                return Some(version);
            }
        }
        ["torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"].iter().find_map(|header| {
            let text = fs::read_to_string(self.include.join(header)).ok()?;
            let number = |part: &str| -> Option<u32> {
                let start = format!("#define TORCH_VERSION_{part} ");
                text.lines().find_map(|line| line.strip_prefix(&start))?.trim().parse().ok()
            };
            Some(format!("{}.{}.{}", number("MAJOR")?, number("MINOR")?, number("PATCH")?))
        })
    }
}

/// `2.13.0+cu130` without its build tag; `None` where the text is no version.
fn plain(text: &str) -> Option<String> {
    let version = text.split('+').next()?.trim();
    let starts_well = version.starts_with(|c: char| c.is_ascii_digit()) && version.contains('.');
    (starts_well && !version.contains(char::is_whitespace)).then(|| version.to_owned())
}
