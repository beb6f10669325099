//! How a failure on one rank ends the pipeline on all of them.

use super::Pipeline;
use crate::Error;

impl Pipeline {
    /// Ends the pipeline everywhere, and says where it failed.
    pub(super) fn failed(&self, doing: &str, error: Error) -> Error {
        let rank = self.group.rank();
        let error = match error {
            // It happened between two steps, and is told as if in this one.
            Error::Poisoned { cause } if matches!(*cause, Error::PeerLost { .. }) => cause.duplicate(),
            error => error,
        };
        // Otherwise a stage failed, or another group of this rank: a tensor-parallel one, say.
        let lost_here = !self.group.is_well();
        if !lost_here {
            let source = Some(std::io::Error::other(error.to_string()));
            self.group.abort_because(Error::PeerLost { rank, op: format!("the {doing}"), source });
        }
        let error = match error {
            Error::PeerLost { rank: lost, op, source } => {
                let op = match lost_here {
                    // The words of a rank whose stage failed name the stage already.
                    _ if op.contains("stage") => op,
                    true => format!(
                        "{op} (it has stage {}; rank {rank} was in the {doing})",
                        self.stages_of(lost)
                    ),
                    false => {
                        format!("{op} of another group (rank {rank} of the pipeline was in the {doing})")
                    }
                };
                Error::PeerLost { rank: lost, op, source }
            }
            other if other.poisons() || matches!(other, Error::Poisoned { .. }) => other,
            other => Error::Callback { reason: format!("rank {rank}, {doing}: {other}") },
        };
        // Who shares a weight or the stage with this rank waits in another group.
        let words = error.to_string();
        self.ties.borrow().iter().for_each(|tie| tie.give_up(&words));
        self.group.abort_crossing(&words);
        error
    }

    /// The stages of a rank, in words.
    pub(super) fn stages_of(&self, rank: usize) -> String {
        let stages: Vec<_> =
            (0..self.stages.len()).map(|c| (c * self.group.size() + rank).to_string()).collect();
        stages.join(" and ")
    }
}
