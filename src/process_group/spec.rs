//! Which backend serves which device.

use std::fmt;
use std::sync::Arc;

use tch::Device;

use crate::backend::{CollectiveBackend, is_backend_available};
use crate::{Error, Result};

/// A backend by name, where a string would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// NCCL for CUDA tensors where it is available, native for CPU tensors.
    #[default]
    Auto,
    /// The engine of this crate: CPU tensors, every kind and every operation.
    Native,
    /// libtorch's Gloo: CPU tensors, and worlds shared with Python.
    Gloo,
    /// libtorch's NCCL: CUDA tensors.
    Nccl,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Gloo => "gloo",
            Self::Nccl => "nccl",
        })
    }
}

/// Which backend serves which device: a name (`"native"`, `"gloo"`, `"nccl"`, a registered one), or one
/// per device (`"cpu:native,cuda:nccl"`), or `"auto"`.
///
/// CUDA tensors without a backend of their own are copied to the CPU and back.
///
/// ```
/// use tch_distributed::{Backend, BackendSpec};
/// assert_eq!(BackendSpec::from("cpu:native,cuda:nccl").to_string(), "cpu:native,cuda:nccl");
/// assert_eq!(BackendSpec::from(Backend::Native), BackendSpec::from("Native"));
/// assert_eq!(BackendSpec::default(), BackendSpec::from(Backend::Auto));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSpec(String);

impl BackendSpec {
    /// The backend's name for CPU tensors and the one for CUDA tensors.
    pub(super) fn resolve(&self) -> Result<(Option<String>, Option<String>)> {
        let text = self.0.as_str();
        if text == "auto" {
            let cuda = is_backend_available("nccl").then(|| "nccl".to_owned());
            return Ok((Some("native".to_owned()), cuda));
        }
        if !text.contains(':') {
            return Ok(match text {
                "nccl" => (None, Some(text.to_owned())),
                _ => (Some(text.to_owned()), None),
            });
        }
        let (mut cpu, mut cuda) = (None, None);
        for pair in text.split(',') {
            let wrong = |reason: &str| {
                Error::invalid("backend", format!("{reason} in {text:?}; expected \"cpu:NAME,cuda:NAME\""))
            };
            let (device, name) = pair.split_once(':').ok_or_else(|| wrong("a part without ':'"))?;
            let slot = match device.trim() {
                "cpu" => &mut cpu,
                "cuda" => &mut cuda,
                other => return Err(wrong(&format!("unknown device {other:?}"))),
            };
            if slot.replace(name.trim().to_owned()).is_some() {
                return Err(wrong(&format!("device {device:?} given twice")));
            }
        }
        Ok((cpu, cuda))
    }
}

impl Default for BackendSpec {
    fn default() -> Self {
        Backend::Auto.into()
    }
}

impl From<&str> for BackendSpec {
    fn from(text: &str) -> Self {
        let text = text.trim().to_lowercase();
        Self(if text.is_empty() { "auto".to_owned() } else { text })
    }
}

impl From<String> for BackendSpec {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<&String> for BackendSpec {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl From<Backend> for BackendSpec {
    fn from(backend: Backend) -> Self {
        Self(backend.to_string())
    }
}

impl fmt::Display for BackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The backends of a group.
pub(super) struct Backends {
    pub(super) cpu: Option<Arc<dyn CollectiveBackend>>,
    pub(super) cuda: Option<Arc<dyn CollectiveBackend>>,
}

impl Backends {
    /// The backend for tensors of a device.
    #[inline(always)]
    pub(super) fn of(&self, device: Device) -> Result<&Arc<dyn CollectiveBackend>> {
        let backend = match device {
            Device::Cpu => self.cpu.as_ref(),
            _ => self.cuda.as_ref().or(self.cpu.as_ref()),
        };
        backend.ok_or_else(|| Error::Unsupported {
            backend: self.names(),
            what: "CPU tensors (no backend was given for them: try \"cpu:native,cuda:nccl\")".to_owned(),
        })
    }

    /// The backend for what has no tensor, e.g. a barrier.
    pub(super) fn any(&self) -> Result<&Arc<dyn CollectiveBackend>> {
        self.of(if self.cpu.is_some() { Device::Cpu } else { Device::Cuda(0) })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<dyn CollectiveBackend>> {
        self.cpu.iter().chain(&self.cuda)
    }

    pub(super) fn names(&self) -> String {
        match (&self.cpu, &self.cuda) {
            (Some(cpu), Some(cuda)) => format!("cpu:{},cuda:{}", cpu.name(), cuda.name()),
            (Some(one), None) | (None, Some(one)) => one.name().to_owned(),
            (None, None) => "none".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::BackendSpec;

    fn resolve(text: &str) -> (Option<String>, Option<String>) {
        BackendSpec::from(text).resolve().unwrap()
    }

    #[test]
    fn one_name_serves_all_devices_but_nccl_serves_cuda_alone() {
        assert_eq!(resolve(" Gloo "), (Some("gloo".into()), None));
        assert_eq!(resolve("nccl"), (None, Some("nccl".into())));
        assert_eq!(resolve("").0, Some("native".into()));
    }

    #[test]
    fn a_backend_per_device_is_told_apart_and_mistakes_are_named() {
        assert_eq!(resolve("cpu:native, cuda:nccl"), (Some("native".into()), Some("nccl".into())));
        for wrong in ["cpu:native,cuda", "tpu:native", "cpu:native,cpu:gloo"] {
            let error = BackendSpec::from(wrong).resolve().unwrap_err().to_string();
            assert!(error.contains("invalid backend"), "{error}");
        }
    }
}
