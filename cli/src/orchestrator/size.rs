//! Kubernetes quantities of storage, with a sentence for what is none.

use ::api::{ErrorKind, quantity};

use crate::failure::Failure;

/// Reads a quantity as a number of bytes, rounded up.
pub fn parse(text: &str) -> Result<u64, Failure> {
    quantity::bytes(text).ok_or_else(|| {
        Failure::new(ErrorKind::Invalid, format!("`{text}` is not a size; write for example 10Gi, 500Mi or 1073741824"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_size_is_refused() {
        assert_eq!(parse("1Ki").unwrap(), 1024);
        assert_eq!(parse("10GB").unwrap_err().kind, ErrorKind::Invalid);
    }
}
