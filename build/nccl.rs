//! What the feature `nccl` needs beyond libtorch's headers: those of CUDA and NCCL, and the CUDA part of libtorch.
//! No GPU is needed to build.

use std::env;
use std::path::{Path, PathBuf};

use crate::libtorch::Libtorch;

/// Names a folder that holds `cu13/include` and `nccl/include`; `cargo xtask setup --nccl` makes one, with libtorch's
/// CUDA part beside it.
const PROVIDED: &str = "TCH_DISTRIBUTED_NVIDIA";

/// Found last, so that the true headers of a toolkit that has them win.
const STAND_INS: &str = "src/libtorch/c10d/headers/cuda";

pub(crate) struct Nccl {
    includes: Vec<PathBuf>,
    /// The folder of `libtorch_cuda.so`.
    lib: PathBuf,
}

impl Nccl {
    /// `None` where the feature is off.
    pub(crate) fn find(libtorch: &Libtorch) -> Result<Option<Self>, String> {
        if env::var_os("CARGO_FEATURE_NCCL").is_none() {
            return Ok(None);
        }
        let provided = named(PROVIDED);
        let wheels = libtorch.lib.ancestors().nth(2).map(|packages| packages.join("nvidia"));
        let toolkits = [named("CUDA_HOME"), named("CUDA_PATH"), Some(PathBuf::from("/usr/local/cuda"))];
        let under = |folder: &Option<PathBuf>, part: &str| folder.as_ref().map(|folder| folder.join(part));
        let toolkits = || toolkits.iter().map(|toolkit| under(toolkit, "include"));

        let cuda = [under(&provided, "cu13/include")]
            .into_iter()
            .chain(toolkits())
            .chain([under(&wheels, "cu13/include"), Some(PathBuf::from("/usr/include"))]);
        let nccl = [under(&provided, "nccl/include"), under(&named("NCCL_HOME"), "include")]
            .into_iter()
            .chain(toolkits())
            .chain([under(&wheels, "nccl/include"), Some(PathBuf::from("/usr/include"))]);
        let cuda = holder("cuda_runtime_api.h", "CUDA", "CUDA_HOME", cuda)?;
        let nccl = holder("nccl.h", "NCCL", "NCCL_HOME", nccl)?;
        let mut includes = vec![cuda.join("cccl"), cuda, nccl];
        // The compiler looks into the system's folder by itself, and must do so last.
        includes.retain(|folder| folder.is_dir() && folder != Path::new("/usr/include"));
        Ok(Some(Self { includes, lib: cuda_part(libtorch, provided)? }))
    }

    pub(crate) fn compile(&self, build: &mut cc::Build) {
        build.includes(&self.includes).flag(format!("-idirafter{STAND_INS}"));
    }

    /// The CUDA part of libtorch needs CUDA's own libraries, which a machine that only builds may lack.
    pub(crate) fn link(&self) {
        println!("cargo::rustc-link-search=native={}", self.lib.display());
        println!("cargo::rustc-link-arg=-Wl,--allow-shlib-undefined");
        for name in ["torch_cuda", "c10_cuda"] {
            println!("cargo::rustc-link-lib=dylib={name}");
        }
    }
}

fn named(variable: &str) -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed={variable}");
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The first folder that holds the header.
fn holder(
    header: &str,
    whose: &str,
    variable: &str,
    folders: impl Iterator<Item = Option<PathBuf>>,
) -> Result<PathBuf, String> {
    let folders: Vec<_> = folders.flatten().collect();
    folders.iter().find(|folder| folder.join(header).is_file()).cloned().ok_or_else(|| {
        let looked: Vec<_> = folders.iter().map(|folder| format!("- {}", folder.display())).collect();
        format!(
            "the feature nccl of tch-distributed needs {whose}'s header {header}, which is in none of\n\
             {}\n\
             What to do, one of:\n\
             - `cargo xtask setup --nccl` in the repository of tch-distributed, which fetches the headers; a dependent \
             sets {PROVIDED} to the folder that it records in .cargo/libtorch.toml;\n\
             - {variable}=<folder that holds include/{header}>;\n\
             - a libtorch that is Python's torch with its nvidia wheels beside it;\n\
             - build without the feature nccl.",
            looked.join("\n")
        )
    })
}

/// Libtorch's own folder, or where libtorch is for the CPU only, the folder that `cargo xtask setup --nccl` made.
fn cuda_part(libtorch: &Libtorch, provided: Option<PathBuf>) -> Result<PathBuf, String> {
    let beside = provided.and_then(|nvidia| Some(nvidia.parent()?.join("torch/lib")));
    let mut folders = [Some(libtorch.lib.clone()), beside].into_iter().flatten();
    folders.find(|lib| lib.join("libtorch_cuda.so").is_file() && lib.join("libc10_cuda.so").is_file()).ok_or_else(
        || {
            format!(
                "the feature nccl of tch-distributed needs a libtorch with CUDA, and the one in {} is for the CPU: \
                 there is no libtorch_cuda.so.\n\
                 Name another by LIBTORCH or LIBTORCH_USE_PYTORCH=1; or, only to build, `cargo xtask setup --nccl` in \
                 the repository of tch-distributed fetches what is linked with.",
                libtorch.lib.display()
            )
        },
    )
}
