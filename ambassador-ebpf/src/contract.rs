//! The contract between the halves: keys, values, constants, map and program names.
#![no_std]
#![forbid(unsafe_code)]
