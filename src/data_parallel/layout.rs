//! What a model consists of: its parameters, in order, and its buffers, by name.

use std::collections::{HashMap, HashSet};

use tch::{Kind, Tensor, nn};

use crate::{Error, Result, libtorch};

/// What a tensor of a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Role {
    /// A parameter with a gradient: broadcast once, its gradient averaged in every step.
    Trained,
    /// A parameter without: broadcast once.
    Frozen,
    /// Everything else: broadcast once and before every forward in training.
    Buffer,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Trained => "parameter",
            Self::Frozen => "frozen parameter",
            Self::Buffer => "buffer",
        }
    }
}

/// A tensor of a model.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) tensor: Tensor,
}

/// Everything in a `VarStore` but what is to be ignored: parameters in the order in which they were made,
/// then buffers by name; what has several names comes once. (A `VarStore` keeps parameters in a list without names and names in a map
/// without order; the two are matched by the memory they share.)
pub(super) fn layout(vs: &nn::VarStore, ignore: &[String]) -> Result<Vec<Member>> {
    let mut named: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(unknown) = ignore.iter().find(|name| !named.iter().any(|(known, _)| known == *name)) {
        return Err(Error::invalid("ignore", format!("the VarStore has nothing named {unknown:?}")));
    }
    let mut places: HashMap<Place, Vec<usize>> = HashMap::new();
    for (index, (_, tensor)) in named.iter().enumerate().rev() {
        places.entry(place(tensor)).or_default().push(index);
    }
    let mut is_parameter = HashSet::new();
    let mut members = Vec::with_capacity(named.len());
    for (order, tensor) in vs.trainable_variables().into_iter().enumerate() {
        let name = match places.get_mut(&place(&tensor)).and_then(Vec::pop) {
            Some(index) => {
                is_parameter.insert(index);
                named[index].0.clone()
            }
            None => format!("parameter {order}"),
        };
        let role = if tensor.requires_grad() { Role::Trained } else { Role::Frozen };
        members.push(Member { name, role, tensor });
    }
    for (index, (name, tensor)) in named.into_iter().enumerate() {
        if !is_parameter.contains(&index) {
            members.push(Member { name, role: Role::Buffer, tensor });
        }
    }
    members.retain(|member| !ignore.contains(&member.name));
    Ok(once(members))
}

/// A tensor with several names (tied weights) is one member, by its first.
fn once(members: Vec<Member>) -> Vec<Member> {
    let mut kept: Vec<Member> = Vec::with_capacity(members.len());
    let mut places: HashMap<Place, Vec<usize>> = HashMap::new();
    for member in members {
        let here = places.entry(place(&member.tensor)).or_default();
        if !here.iter().any(|&index| libtorch::same(&kept[index].tensor, &member.tensor)) {
            here.push(kept.len());
            kept.push(member);
        }
    }
    kept
}

type Place = (usize, Vec<i64>, Kind);

/// Tensors with the same place are the same tensor (or hold nothing).
fn place(tensor: &Tensor) -> Place {
    (tensor.data_ptr() as usize, tensor.size(), tensor.kind())
}

#[cfg(test)]
mod tests {
    use super::{Role, layout};
    use tch::{Device, nn};

    #[test]
    fn parameters_come_in_the_order_made_and_buffers_by_name() {
        let vs = nn::VarStore::new(Device::Cpu);
        let root = vs.root();
        let z = nn::linear(&root / "z", 2, 3, Default::default());
        let _norm = nn::batch_norm1d(&root / "norm", 3, Default::default());
        let _a = nn::linear(&root / "a", 3, 1, Default::default());
        let _ = z.ws.set_requires_grad(false);
        let found: Vec<_> = layout(&vs, &["a.bias".to_owned()])
            .unwrap()
            .into_iter()
            .map(|member| (member.name, member.role))
            .collect();
        let expected = [
            ("z.weight", Role::Frozen),
            ("z.bias", Role::Trained),
            ("norm.weight", Role::Trained),
            ("norm.bias", Role::Trained),
            ("a.weight", Role::Trained),
            ("norm.running_mean", Role::Buffer),
            ("norm.running_var", Role::Buffer),
        ];
        let mut expected: Vec<_> = expected.map(|(name, role)| (name.to_owned(), role)).into();
        // tch makes a layer's bias before or after its weight as it likes: compare layer by layer.
        let mut found_sorted = found.clone();
        let layer = |entry: &(String, Role)| {
            found.iter().position(|f| f.0.split('.').next() == entry.0.split('.').next())
        };
        expected.sort_by_key(|e| (e.1 == Role::Buffer, layer(e), e.0.clone()));
        found_sorted.sort_by_key(|e| (e.1 == Role::Buffer, layer(e), e.0.clone()));
        assert_eq!(found_sorted, expected);
        let position = |name: &str| found.iter().position(|f| f.0 == name).unwrap();
        assert!(position("z.bias") < position("norm.bias") && position("norm.bias") < position("a.weight"));
    }

    #[test]
    fn a_misspelt_name_to_ignore_is_an_error_that_names_it() {
        let vs = nn::VarStore::new(Device::Cpu);
        let _fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
        let error = layout(&vs, &["fc.wieght".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("fc.wieght"), "{error}");
    }
}
