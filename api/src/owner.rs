//! Whose a thing is: when the object goes, however it goes, so does the thing.

use serde::{Deserialize, Serialize};

/// An object of ours that owns something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub kind: String,
    pub name: String,
    pub uid: String,
}

impl Owner {
    /// `None` for an object that is not stored yet.
    pub fn of<T: kube::Resource<DynamicType = ()>>(object: &T) -> Option<Owner> {
        let meta = object.meta();
        Some(Owner { kind: T::kind(&()).into_owned(), name: meta.name.clone()?, uid: meta.uid.clone()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_stored_owns_anything() {
        let mut manager = crate::BackingImageManager::new("bim-1", Default::default());
        assert_eq!(Owner::of(&manager), None);
        manager.metadata.uid = Some("u".into());
        let [kind, name, uid] = ["BackingImageManager", "bim-1", "u"].map(str::to_owned);
        assert_eq!(Owner::of(&manager), Some(Owner { kind, name, uid }));
    }
}
