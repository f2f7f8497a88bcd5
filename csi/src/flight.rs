//! One call per volume at a time.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::CsiError;

/// The names that a call is working on.
#[derive(Clone, Debug, Default)]
pub struct InFlight(Arc<Mutex<BTreeSet<String>>>);

/// Holds a name until it is dropped.
#[derive(Debug)]
pub struct Flight {
    all: InFlight,
    name: String,
}

impl InFlight {
    /// Takes a name; refused while another call has it. The caller of CSI repeats the call then.
    pub fn take(&self, name: &str) -> Result<Flight, CsiError> {
        let taken = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        if taken {
            Ok(Flight { all: self.clone(), name: name.to_owned() })
        } else {
            Err(CsiError::InFlight { volume_id: name.to_owned() })
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.all.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_free_again_when_its_call_has_ended() {
        let all = InFlight::default();
        let first = all.take("v").unwrap();
        assert!(all.take("v").is_err());
        assert!(all.take("w").is_ok());
        drop(first);
        assert!(all.take("v").is_ok());
    }
}
