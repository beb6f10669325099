//! A mesh: the ranks of a group as a grid with named axes.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{Error, ProcessGroup, Result};

/// The ranks of a group as a grid with named axes, and a group for every line along an axis.
///
/// The last axis varies fastest: in a mesh `[("dp", 2), ("tp", 2)]` the ranks 0 and 1 are one `tp` group. Put the
/// axis that communicates most last, so that its ranks are near each other.
///
/// ```
/// use tch_distributed::{model_parallel::DeviceMesh, testing};
///
/// testing::run_threads(4, |world| {
///     let mesh = DeviceMesh::new(&world, &[("dp", 2), ("tp", 2)]).unwrap();
///     assert_eq!(mesh.coordinates(), [world.rank() / 2, world.rank() % 2]);
///     let tp = mesh.group("tp").unwrap();
///     assert_eq!(tp.rank(), mesh.rank("tp").unwrap());
///     assert_eq!(tp.size(), mesh.size("tp").unwrap());
/// });
/// ```
#[doc(alias = "init_device_mesh")]
#[derive(Clone)]
pub struct DeviceMesh {
    root: ProcessGroup,
    axes: Vec<Axis>,
    flat: Arc<Mutex<HashMap<Vec<String>, ProcessGroup>>>,
}

#[derive(Clone)]
struct Axis {
    name: String,
    coordinate: usize,
    group: ProcessGroup,
}

impl DeviceMesh {
    /// Lays the ranks of `group` out along `axes`, each a name and a size. Every rank of the group calls it, with the
    /// same axes.
    ///
    /// # Errors
    /// `InvalidArgument` where there is no axis, a name is empty or given twice, a size is zero, or the sizes do not
    /// multiply to the size of the group; those of making groups.
    pub fn new(group: &ProcessGroup, axes: &[(&str, usize)]) -> Result<Self> {
        check(axes, group.size())?;
        let sizes: Vec<usize> = axes.iter().map(|a| a.1).collect();
        let here = coordinates_of(group.rank(), &sizes);
        let axes = (0..axes.len())
            .map(|axis| {
                // Ranks that differ along this axis only have the others' coordinates in common.
                let line =
                    here.iter().enumerate().map(|(a, &c)| if a == axis { 0 } else { c }).collect::<Vec<_>>();
                let color = rank_of(&line, &sizes);
                let group = subgroup(group, color, here[axis])?;
                Ok(Axis { name: axes[axis].0.to_owned(), coordinate: here[axis], group })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { root: group.clone(), axes, flat: Arc::default() })
    }

    /// The group of the ranks that differ from this one along `axis` only.
    ///
    /// # Errors
    /// `InvalidArgument` that lists the axes, if there is none of this name.
    #[doc(alias = "get_group")]
    pub fn group(&self, axis: &str) -> Result<ProcessGroup> {
        Ok(self.axis(axis)?.group.clone())
    }

    /// This rank's place along `axis`: its rank in that group.
    ///
    /// # Errors
    /// As [`group`](Self::group).
    #[doc(alias = "get_local_rank")]
    pub fn rank(&self, axis: &str) -> Result<usize> {
        Ok(self.axis(axis)?.coordinate)
    }

    /// The number of ranks along `axis`.
    ///
    /// # Errors
    /// As [`group`](Self::group).
    pub fn size(&self, axis: &str) -> Result<usize> {
        Ok(self.axis(axis)?.group.size())
    }

    /// The group of the whole mesh.
    pub fn world(&self) -> &ProcessGroup {
        &self.root
    }

    /// The names and sizes of the axes.
    #[doc(alias = "mesh_dim_names")]
    #[doc(alias = "shape")]
    pub fn axes(&self) -> Vec<(&str, usize)> {
        self.axes.iter().map(|a| (a.name.as_str(), a.group.size())).collect()
    }

    /// This rank's place along each axis.
    #[doc(alias = "get_coordinate")]
    pub fn coordinates(&self) -> Vec<usize> {
        self.axes.iter().map(|a| a.coordinate).collect()
    }

    /// The rank (in the group of the whole mesh) at these coordinates, one for each axis.
    ///
    /// # Errors
    /// `InvalidArgument` for another number of coordinates, or one outside its axis.
    pub fn rank_at(&self, coordinates: &[usize]) -> Result<usize> {
        let sizes: Vec<usize> = self.axes.iter().map(|a| a.group.size()).collect();
        if coordinates.len() != sizes.len() || coordinates.iter().zip(&sizes).any(|(c, s)| c >= s) {
            return Err(Error::invalid("coordinates", format!("{coordinates:?} in a mesh of {sizes:?}")));
        }
        Ok(rank_of(coordinates, &sizes))
    }

    /// One group over several axes: the ranks that agree with this one on all others, the first axis given slowest.
    ///
    /// Every rank of the mesh calls it the first time; later calls give the same group.
    ///
    /// # Errors
    /// `InvalidArgument` for no axis, an unknown one, or one given twice; those of making a group.
    pub fn flatten(&self, axes: &[&str]) -> Result<ProcessGroup> {
        let picked = self.pick(axes)?;
        if let [one] = picked[..] {
            return Ok(self.axes[one].group.clone());
        }
        let key: Vec<String> = axes.iter().map(|&a| a.to_owned()).collect();
        if let Some(group) = self.flat.lock().get(&key) {
            return Ok(group.clone());
        }
        let sizes: Vec<usize> = self.axes.iter().map(|a| a.group.size()).collect();
        let rest: Vec<usize> = self
            .axes
            .iter()
            .enumerate()
            .map(|(i, a)| if picked.contains(&i) { 0 } else { a.coordinate })
            .collect();
        let inside: Vec<usize> = picked.iter().map(|&i| self.axes[i].coordinate).collect();
        let inside_sizes: Vec<usize> = picked.iter().map(|&i| sizes[i]).collect();
        let group = subgroup(&self.root, rank_of(&rest, &sizes), rank_of(&inside, &inside_sizes))?;
        self.flat.lock().insert(key, group.clone());
        Ok(group)
    }

    /// The mesh of some axes, at this rank's place along the others; its order is the one given.
    ///
    /// Every rank of the mesh calls it.
    ///
    /// # Errors
    /// As [`flatten`](Self::flatten).
    #[doc(alias = "__getitem__")]
    pub fn submesh(&self, axes: &[&str]) -> Result<Self> {
        let root = self.flatten(axes)?;
        let axes = self.pick(axes)?.into_iter().map(|i| self.axes[i].clone()).collect();
        Ok(Self { root, axes, flat: Arc::default() })
    }

    fn axis(&self, name: &str) -> Result<&Axis> {
        self.axes.iter().find(|a| a.name == name).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> Error {
        let known: Vec<_> = self.axes.iter().map(|a| a.name.as_str()).collect();
        Error::invalid("axis", format!("the mesh has no axis {name:?}: it has {}", known.join(", ")))
    }

    /// The places of the named axes.
    fn pick(&self, names: &[&str]) -> Result<Vec<usize>> {
        if names.is_empty() {
            return Err(Error::invalid("axes", "at least one axis is needed"));
        }
        let mut picked = Vec::new();
        for &name in names {
            let place = self.axes.iter().position(|a| a.name == name).ok_or_else(|| self.unknown(name))?;
            if picked.contains(&place) {
                return Err(Error::invalid("axes", format!("{name:?} is given twice")));
            }
            picked.push(place);
        }
        Ok(picked)
    }
}

/// The ranks of one color, in the order of their keys; every rank of the parent calls it.
fn subgroup(parent: &ProcessGroup, color: usize, key: usize) -> Result<ProcessGroup> {
    let group = parent.split(Some(color as i64), key as i64)?;
    group.ok_or_else(|| Error::NotMember { rank: parent.rank(), group: parent.name().to_owned() })
}

fn check(axes: &[(&str, usize)], world: usize) -> Result<()> {
    if axes.is_empty() {
        return Err(Error::invalid("axes", "a mesh needs at least one axis"));
    }
    for (i, (name, size)) in axes.iter().enumerate() {
        if name.is_empty() {
            return Err(Error::invalid("axes", format!("axis {i} has no name")));
        }
        if axes[..i].iter().any(|a| a.0 == *name) {
            return Err(Error::invalid("axes", format!("{name:?} is given twice")));
        }
        if *size == 0 {
            return Err(Error::invalid("axes", format!("{name:?} has size 0")));
        }
    }
    let product = axes.iter().try_fold(1_usize, |product, a| product.checked_mul(a.1));
    if product != Some(world) {
        let written: Vec<_> = axes.iter().map(|(name, size)| format!("{name} {size}")).collect();
        let product = product.map_or("more than can be counted".to_owned(), |p| p.to_string());
        return Err(Error::invalid(
            "axes",
            format!("{} make {product} ranks, but the group has {world}", written.join(" x ")),
        ));
    }
    Ok(())
}

/// Where a rank is in a grid whose last axis varies fastest.
fn coordinates_of(rank: usize, sizes: &[usize]) -> Vec<usize> {
    let mut rest = rank;
    let mut coordinates: Vec<usize> = sizes
        .iter()
        .rev()
        .map(|&size| {
            let c = rest % size;
            rest /= size;
            c
        })
        .collect();
    coordinates.reverse();
    coordinates
}

fn rank_of(coordinates: &[usize], sizes: &[usize]) -> usize {
    coordinates.iter().zip(sizes).fold(0, |rank, (c, size)| rank * size + c)
}

impl fmt::Display for DeviceMesh {
    /// For instance `dp 0 of 2, tp 1 of 2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, axis) in self.axes.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{} {} of {}", axis.name, axis.coordinate, axis.group.size())?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceMesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMesh({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_axis_varies_fastest() {
        let grid: Vec<_> = (0..6).map(|rank| coordinates_of(rank, &[2, 3])).collect();
        assert_eq!(grid, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]);
        assert!((0..6).all(|rank| rank_of(&grid[rank], &[2, 3]) == rank));
    }

    #[test]
    fn axes_that_cannot_be_are_refused_with_the_reason() {
        for (axes, words) in [
            (&[][..], "at least one axis"),
            (&[("", 4)], "no name"),
            (&[("dp", 2), ("dp", 2)], "given twice"),
            (&[("dp", 0), ("tp", 4)], "size 0"),
            (&[("dp", 2), ("tp", 3)], "dp 2 x tp 3 make 6 ranks, but the group has 4"),
            (&[("dp", usize::MAX), ("tp", 3)], "more than can be counted"),
        ] {
            let error = check(axes, 4).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        check(&[("dp", 1), ("pp", 2), ("tp", 2)], 4).unwrap();
    }
}
