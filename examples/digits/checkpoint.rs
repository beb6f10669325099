//! Everything that a run needs to go on as if it had not stopped, in one file.

use std::path::Path;

use tch::{Kind, Tensor, nn};
use tch_distributed as dist;

use crate::sgd::Sgd;

pub(crate) const FILE: &str = "checkpoint.safetensors";

/// How an epoch went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Epoch {
    /// The mean training loss.
    pub(crate) loss: f64,
    /// In percent of the held-out images.
    pub(crate) accuracy: f64,
}

/// Named tensors: `model.*`, `velocity.*`, and `history`, a row an epoch. (The order of the images follows from
/// the seed and the epoch, so there is no generator to save.)
pub(crate) struct Checkpoint(Vec<(String, Tensor)>);

impl Checkpoint {
    pub(crate) fn take(vs: &nn::VarStore, optimizer: &Sgd, history: &[Epoch]) -> Self {
        let model = vs.variables().into_iter().map(|(name, tensor)| (format!("model.{name}"), tensor));
        let velocity =
            optimizer.state.iter().map(|(name, _, v)| (format!("velocity.{name}"), v.shallow_clone()));
        let rows: Vec<f64> = history.iter().flat_map(|epoch| [epoch.loss, epoch.accuracy]).collect();
        let history = ("history".to_owned(), Tensor::from_slice(&rows).view([-1, 2]));
        Self(model.chain(velocity).chain([history]).collect())
    }

    /// Writes beside the old one first: a run that is interrupted here still has one that is whole.
    pub(crate) fn save(&self, folder: &Path) -> dist::Result<()> {
        std::fs::create_dir_all(folder)?;
        let (unfinished, file) = (folder.join("unfinished.safetensors"), folder.join(FILE));
        Tensor::write_safetensors(&self.0, &unfinished)?;
        Ok(std::fs::rename(unfinished, file)?)
    }

    pub(crate) fn load(folder: &Path) -> dist::Result<Self> {
        Ok(Self(Tensor::read_safetensors(folder.join(FILE))?))
    }

    fn get(&self, name: &str) -> dist::Result<&Tensor> {
        let found = self.0.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor);
        found.ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::InvalidData, format!("the checkpoint has no {name}"))
                .into()
        })
    }

    pub(crate) fn history(&self) -> dist::Result<Vec<Epoch>> {
        let rows = Vec::<f64>::try_from(self.get("history")?.to_kind(Kind::Double).flatten(0, -1))?;
        Ok(rows.chunks_exact(2).map(|row| Epoch { loss: row[0], accuracy: row[1] }).collect())
    }

    /// Puts model and optimizer back; gives the epochs behind them.
    pub(crate) fn restore(&self, vs: &nn::VarStore, optimizer: &mut Sgd) -> dist::Result<Vec<Epoch>> {
        tch::no_grad(|| -> dist::Result<()> {
            for (name, mut tensor) in vs.variables() {
                tensor.f_copy_(self.get(&format!("model.{name}"))?)?;
            }
            for (name, _, velocity) in &mut optimizer.state {
                velocity.f_copy_(self.get(&format!("velocity.{name}"))?)?;
            }
            Ok(())
        })?;
        self.history()
    }
}
