//! The Python wheels that libtorch and the CUDA headers are taken from, pinned by version, size and SHA-256.

/// A file of the Python package index.
pub(crate) struct Wheel {
    /// As `pip download` takes it.
    pub(crate) requirement: &'static str,
    pub(crate) file: &'static str,
    pub(crate) bytes: u64,
    pub(crate) sha256: &'static str,
}

/// What is kept of a wheel: paths inside it.
pub(crate) type Keep = fn(&str) -> bool;

/// A folder of the cache, made of parts of wheels.
pub(crate) struct Bundle {
    pub(crate) folder: String,
    /// A file that is there when all is there.
    pub(crate) proof: &'static str,
    pub(crate) parts: Vec<(&'static Wheel, Keep)>,
    /// Bytes on disk when done.
    pub(crate) unpacked: u64,
}

/// A version of libtorch that this crate is tested with.
pub(crate) struct Release {
    pub(crate) libtorch: &'static str,
    /// The tch that wants it.
    pub(crate) tch: &'static str,
    /// Whether that tch was published. Where it was not, another one takes this libtorch when
    /// `LIBTORCH_BYPASS_VERSION_CHECK` is set.
    pub(crate) published: bool,
    torch: Wheel,
    nccl: &'static Wheel,
}

pub(crate) const RELEASES: &[Release] = &[
    Release {
        libtorch: "2.13.0",
        tch: "0.26",
        published: true,
        torch: Wheel {
            requirement: "torch==2.13.0",
            file: "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            bytes: 526_605_292,
            sha256: "796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b",
        },
        nccl: &NCCL_2_29,
    },
    Release {
        libtorch: "2.12.0",
        tch: "0.25",
        published: false,
        torch: Wheel {
            requirement: "torch==2.12.0",
            file: "torch-2.12.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            bytes: 532_261_691,
            sha256: "4b4f64c2c2b11f7510d93dd6412b87025ff6eddd6bb61c3b5a3d892ea20c4756",
        },
        nccl: &NCCL_2_29,
    },
    Release {
        libtorch: "2.11.0",
        tch: "0.24",
        published: true,
        torch: Wheel {
            requirement: "torch==2.11.0",
            file: "torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            bytes: 530_712_279,
            sha256: "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
        },
        nccl: &NCCL_2_28,
    },
];

const NCCL_2_29: Wheel = Wheel {
    requirement: "nvidia-nccl-cu13==2.29.7",
    file: "nvidia_nccl_cu13-2.29.7-py3-none-manylinux_2_18_x86_64.whl",
    bytes: 205_976_000,
    sha256: "edd81538446786ec3b73972543e53bb43bcaf0bfc8ef76cb679fcc390ffe136d",
};

const NCCL_2_28: Wheel = Wheel {
    requirement: "nvidia-nccl-cu13==2.28.9",
    file: "nvidia_nccl_cu13-2.28.9-py3-none-manylinux_2_18_x86_64.whl",
    bytes: 196_493_177,
    sha256: "e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42",
};

const CUDA_RUNTIME: Wheel = Wheel {
    requirement: "nvidia-cuda-runtime==13.0.96",
    file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    bytes: 2_243_632,
    sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
};

const CUDA_CUPTI: Wheel = Wheel {
    requirement: "nvidia-cuda-cupti==13.0.85",
    file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
    bytes: 10_715_597,
    sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
};

const CUDA_CRT: Wheel = Wheel {
    requirement: "nvidia-cuda-crt==13.0.88",
    file: "nvidia_cuda_crt-13.0.88-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    bytes: 134_086,
    sha256: "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
};

const CUDA_CCCL: Wheel = Wheel {
    requirement: "nvidia-cuda-cccl==13.0.85",
    file: "nvidia_cuda_cccl-13.0.85-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    bytes: 3_120_526,
    sha256: "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649",
};

impl Release {
    pub(crate) fn of_libtorch(version: &str) -> Option<&'static Self> {
        RELEASES.iter().find(|release| release.libtorch == version)
    }

    /// `version` is tch's, such as `0.26.0`.
    pub(crate) fn for_tch(version: &str) -> Option<&'static Self> {
        RELEASES.iter().find(|release| version.starts_with(&format!("{}.", release.tch)))
    }

    /// libtorch without its CUDA parts. There is no wheel of that on the index, so it is cut from the CUDA one.
    pub(crate) fn cpu(&'static self) -> Bundle {
        Bundle {
            folder: format!("libtorch-{}-cpu", self.libtorch),
            proof: "torch/lib/libtorch.so",
            parts: vec![
                (&self.torch, cpu_part),
                // The one thing of CUDA that libtorch_cpu.so itself is linked with.
                (&CUDA_RUNTIME, libraries),
                (&CUDA_CUPTI, libraries),
            ],
            unpacked: 600_000_000,
        }
    }

    /// What compiling and linking the feature `nccl` takes beside [`Self::cpu`]; running it takes a CUDA machine.
    pub(crate) fn nccl(&'static self) -> Bundle {
        Bundle {
            folder: format!("libtorch-{}-nccl", self.libtorch),
            proof: "nvidia/nccl/include/nccl.h",
            parts: vec![
                (&self.torch, cuda_part),
                (self.nccl, headers),
                (&CUDA_RUNTIME, headers),
                (&CUDA_CRT, headers),
                (&CUDA_CCCL, headers),
            ],
            unpacked: 600_000_000,
        }
    }
}

fn cpu_part(path: &str) -> bool {
    let Some(inside) = path.strip_prefix("torch/") else { return false };
    match inside.strip_prefix("lib/") {
        Some(library) => matches!(library, "libc10.so" | "libgomp.so.1" | "libtorch_cpu.so"),
        None => inside == "version.py" || inside.starts_with("include/") || inside.starts_with("share/"),
    }
}

fn cuda_part(path: &str) -> bool {
    matches!(path, "torch/lib/libc10_cuda.so" | "torch/lib/libtorch_cuda.so")
}

fn libraries(path: &str) -> bool {
    path.starts_with("nvidia/") && path.contains(".so")
}

fn headers(path: &str) -> bool {
    path.starts_with("nvidia/") && path.contains("/include/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tch_in_our_range_has_its_libtorch() {
        assert_eq!(Release::for_tch("0.26.0").unwrap().libtorch, "2.13.0");
        assert_eq!(Release::for_tch("0.25.0").unwrap().libtorch, "2.12.0");
        assert_eq!(Release::for_tch("0.24.3").unwrap().libtorch, "2.11.0");
        assert!(Release::for_tch("0.2.0").is_none());
        assert_eq!(Release::of_libtorch("2.11.0").unwrap().tch, "0.24");
    }

    #[test]
    fn the_cpu_view_holds_headers_and_no_cuda_library() {
        for kept in ["torch/lib/libtorch_cpu.so", "torch/include/ATen/ATen.h", "torch/version.py"] {
            assert!(cpu_part(kept), "{kept}");
        }
        for dropped in
            ["torch/lib/libtorch_cuda.so", "torch/lib/libtorch.so", "torch/nn/__init__.py", "torchgen/x.py"]
        {
            assert!(!cpu_part(dropped), "{dropped}");
        }
    }

    #[test]
    fn no_two_releases_share_a_folder_of_the_cache() {
        let mut folders: Vec<_> =
            RELEASES.iter().flat_map(|release| [release.cpu().folder, release.nccl().folder]).collect();
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), 2 * RELEASES.len());
    }

    #[test]
    fn every_wheel_is_pinned_by_a_whole_digest() {
        for release in RELEASES {
            for bundle in [release.cpu(), release.nccl()] {
                for (wheel, _) in bundle.parts {
                    assert!(wheel.sha256.len() == 64 && wheel.sha256.bytes().all(|b| b.is_ascii_hexdigit()));
                    assert!(
                        wheel.bytes > 100_000
                            && wheel.file.ends_with(".whl")
                            && wheel.requirement.contains("==")
                    );
                }
            }
        }
    }
}
